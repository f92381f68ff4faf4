"""The built binaries: what they import, and that every CUDA file went into them."""

import importlib.util
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import torch

from build_tools.plan import SM90_ARCH, BuildPlan, is_sm90
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


def find_cuobjdump() -> str:
    """CUDA's own, or the one inside Triton, which comes with torch."""
    places = ["/usr/local/cuda/bin/cuobjdump"]
    if triton := importlib.util.find_spec("triton"):
        folder = Path(triton.origin).parent
        places.append(str(folder / "backends" / "nvidia" / "bin" / "cuobjdump"))
    found = shutil.which("cuobjdump") or next((p for p in places if Path(p).exists()), None)
    assert found, "no cuobjdump: expected it in the CUDA toolkit or in Triton"
    return found


@needs_cuda_library
def test_every_cuda_file_was_compiled_for_its_architectures():
    """As many pieces of machine code and PTX (they are nameless) as the plan has sources."""
    library = str(LIBRARIES[1])
    listing = run(find_cuobjdump(), "-lelf", library) + run(find_cuobjdump(), "-lptx", library)
    compiled = Counter(re.findall(r"\.sm_(\d+)\.(cubin|ptx)", listing))
    built = ops.build_report()["archs"]
    plan = BuildPlan(ROOT, [], "", None, [], built, {})
    wanted = Counter()
    for source in (str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.cu")):
        archs = [arch.strip() for arch in plan.archs_of(source).split(";")]
        if is_sm90(source) and SM90_ARCH not in built:
            archs = []
        for arch in archs:
            number = "".join(re.findall(r"\d", arch))  # the listing says sm_90 for 9.0a, too
            wanted[number, "ptx" if arch.endswith("+PTX") else "cubin"] += 1
    assert compiled == wanted


@needs_cuda_library
def test_code_for_hopper_is_the_kind_with_wgmma():
    exact = {a for a in ops.build_report()["archs"].split(";") if a.endswith("a")}
    listing = run(find_cuobjdump(), "-elf", str(LIBRARIES[1])) if exact else ""
    assert {f"sm_{arch.replace('.', '')}" for arch in exact} <= set(re.findall(r"sm_\w+", listing))
