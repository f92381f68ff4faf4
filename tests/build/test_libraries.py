"""The built binaries: what they import, and that every CUDA file went into them."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from marlin import ops

PACKAGE = Path(ops.__file__).parent
ROOT = PACKAGE.parent
LIBRARIES = [PACKAGE / "_ops.so", PACKAGE / "_ops_cuda.so"]
needs_cuda_library = pytest.mark.skipif(
    not LIBRARIES[1].exists(), reason=f"no CUDA library: {ops.why_no_cuda()}"
)


def run(*command) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda p: p.name)
def test_imports_only_the_stable_abi(library):
    if not library.exists():
        pytest.skip(f"{library.name} is not built: {ops.why_no_cuda()}")
    symbols = run("nm", "-uDC", str(library)).splitlines()
    assert len(symbols) > 10  # nm saw the library
    unstable = [s for s in symbols if re.search(r"\b(at|c10)::|\bPy[A-Z_]", s)]
    assert not unstable


@needs_cuda_library
def test_cuda_runtime_is_static():
    assert "libcudart" not in run("readelf", "-d", str(LIBRARIES[1]))


@needs_cuda_library
def test_cuda_library_is_loaded():
    """Also on a machine without a GPU or a driver."""
    assert ops.why_no_cuda() is None
    for name in ("mul", "pack", "unpack", "pack_scales", "unpack_scales", "dequantize"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"marlin::{name}", "CUDA")


def entry_points(source: Path) -> set[str]:
    return set(re.findall(r"__global__[^;{]*?\b(\w+_kernel)\(", source.read_text()))


@needs_cuda_library
def test_every_cuda_file_was_compiled_for_every_architecture():
    cuobjdump = shutil.which("cuobjdump") or "/usr/local/cuda/bin/cuobjdump"
    if not Path(cuobjdump).exists():
        pytest.skip("cuobjdump is not here")
    listing = run(cuobjdump, "-elf", str(LIBRARIES[1]))
    archs = {a.strip() for a in ops.build_report()["archs"].split(";")}
    for arch in archs:
        if not arch.endswith("+PTX"):
            assert f"sm_{arch.replace('.', '')}" in listing
    for source in (ROOT / "csrc").rglob("*.cu"):
        for kernel in entry_points(source):
            assert kernel in listing, f"{source.name}: {kernel} is not in {LIBRARIES[1].name}"
