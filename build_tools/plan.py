"""What is built: three libraries, their sources and flags, and why CUDA may be missing.

Environment variables:
    MARLIN_BUILD_CUDA   1: fail without nvcc; 0: CPU only; unset: build the CUDA library if nvcc
                        is there.
    MARLIN_CUDA_ARCHS   architectures to narrow to, e.g. "9.0a" or "8.0;8.0+PTX"
    CUDA_HOME           where the toolkit lies, if nvcc is not on PATH
"""

import json
import os
import platform
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

# Machine code for Ampere, Ada and Hopper; PTX of 8.0 for everything newer (PTX of 9.0a would run
# nowhere else).
DEFAULT_ARCHS = "8.0;8.6;8.9;9.0a;8.0+PTX"

# The oldest LibTorch stable ABI that has all we call; a library built so loads in any newer torch.
TORCH_TARGET_VERSION = "0x020a000000000000"

CXX_FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast",
             "-Wall", "-Wextra", "-Wno-psabi", "-Icsrc"]  # fmt: skip

# cpu/isa_NAME.cpp is compiled for NAME alone.
ISA_FLAGS = {
    "csrc/cpu/isa_avx2.cpp": ["-mavx2", "-mfma"],
    "csrc/cpu/isa_avx512.cpp": ["-mavx512f", "-mavx512vl", "-mavx512dq", "-mavx512bw", "-mfma"],
}

CPU_SOURCES = ["csrc/cpu/backend.cpp", "csrc/cpu/pack.cpp", "csrc/cpu/isa_portable.cpp"]
if platform.machine() in ("x86_64", "AMD64"):
    CPU_SOURCES += list(ISA_FLAGS)


@dataclass
class Library:
    """A shared library: `flags` go to every C++ source, `link` to the linker."""

    name: str
    sources: list[str]
    flags: list[str] = field(default_factory=list)
    link: list[str] = field(default_factory=list)


@dataclass
class BuildPlan:
    root: Path
    libraries: list[Library]
    cxx: str
    nvcc: str | None
    nvcc_flags: list[str]
    report: dict  # becomes marlin/_build.json, which `marlin info` and errors read

    def report_text(self) -> str:
        return json.dumps(self.report, indent=2) + "\n"


def find_nvcc() -> str | None:
    """The CUDA compiler, from CUDA_HOME or PATH or the usual place."""
    places = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    on_path = shutil.which("nvcc")
    named = [p for p in places[:2] if p]
    candidates = [str(Path(p) / "bin" / "nvcc") for p in named]
    candidates += [on_path] if on_path else []
    candidates += [str(Path(places[2]) / "bin" / "nvcc")]
    return next((c for c in candidates if Path(c).exists()), None)


def nvcc_version(nvcc: str) -> tuple[int, int]:
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    major, minor = text.split("release ")[1].split(",")[0].split(".")
    return int(major), int(minor)


def arch_flags(archs: str) -> list[str]:
    """nvcc flags for "8.0;9.0a;8.0+PTX": machine code for each, PTX where asked for."""
    flags = []
    for arch in archs.replace(",", ";").split(";"):
        number = arch.strip().removesuffix("+PTX").replace(".", "")
        if not number:
            continue
        if not number.rstrip("af").isdigit():
            raise SystemExit(f"MARLIN_CUDA_ARCHS: expected e.g. '8.0;9.0a;8.0+PTX', got '{archs}'")
        kind = "compute" if arch.strip().endswith("+PTX") else "sm"
        flags.append(f"-gencode=arch=compute_{number},code={kind}_{number}")
    return flags


def why_no_cuda(nvcc: str | None, torch_lib: Path) -> str | None:
    """The reason for which the CUDA library is not built, or None if it is."""
    if os.environ.get("MARLIN_BUILD_CUDA") == "0":
        return "MARLIN_BUILD_CUDA=0 was set when marlin was built"
    if nvcc is None:
        return "nvcc was not found (on PATH or under CUDA_HOME) when marlin was built"
    if nvcc_version(nvcc) < (12, 4):
        return f"nvcc {'.'.join(map(str, nvcc_version(nvcc)))} is too old: 12.4 or newer is needed"
    if not (torch_lib / "libtorch_cuda.so").exists():
        return "the torch that marlin was built with has no CUDA (no libtorch_cuda.so)"
    return None


def plan_build(root: Path) -> BuildPlan:
    """Decides from the machine and the environment what to build."""
    import pybind11
    import torch

    torch_root = Path(torch.__file__).parent
    torch_lib = torch_root / "lib"
    nvcc = find_nvcc()
    missing = why_no_cuda(nvcc, torch_lib)
    if missing and os.environ.get("MARLIN_BUILD_CUDA") == "1":
        raise SystemExit(f"MARLIN_BUILD_CUDA=1, but {missing}")

    torch_flags = [
        f"-isystem{torch_root / 'include'}",
        f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
        "-DUSE_CUDA",
    ]
    border = ["csrc/torch/checks.cpp", "csrc/torch/tensors.cpp"]
    libraries = [
        Library(
            "_ops",
            ["csrc/torch/library.cpp", "csrc/torch/cpu_ops.cpp", *border, *CPU_SOURCES],
            torch_flags,
            [f"-L{torch_lib}", "-ltorch_cpu", "-ltorch", "-lc10"],
        ),
        Library(
            "host",
            ["csrc/bindings/module.cpp", "csrc/dispatch/select.cpp", *CPU_SOURCES],
            [f"-isystem{pybind11.get_include()}", f"-isystem{sysconfig.get_path('include')}"],
            ["-lpthread"],
        ),
    ]
    archs = os.environ.get("MARLIN_CUDA_ARCHS") or DEFAULT_ARCHS
    nvcc_flags = []
    report = {"cuda": missing is None, "why_no_cuda": missing, "torch": torch.__version__}
    if missing is None:
        cuda_home = Path(nvcc).resolve().parent.parent
        kernels = sorted(str(p.relative_to(root)) for p in root.glob("csrc/**/*.cu"))
        dispatch = [f"csrc/dispatch/{name}.cpp" for name in ("device", "launch", "select")]
        libraries.append(
            Library(
                "_ops_cuda",
                ["csrc/torch/cuda_ops.cpp", *dispatch, *border, *kernels],
                [*torch_flags, f"-isystem{cuda_home / 'include'}"],
                [f"-L{torch_lib}", "-ltorch_cuda", "-ltorch_cpu", "-ltorch", "-lc10",
                 f"-L{cuda_home / 'lib64'}", "-lcudart_static", "-lrt", "-ldl", "-lpthread"],
            )  # fmt: skip
        )
        nvcc_flags = ["-std=c++20", "-O3", "-Icsrc", "--expt-relaxed-constexpr", "-lineinfo",
                      "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall", "--compress-mode=size",
                      *arch_flags(archs)]  # fmt: skip
        report |= {"nvcc": ".".join(map(str, nvcc_version(nvcc))), "archs": archs}
    return BuildPlan(root, libraries, os.environ.get("CXX", "g++"), nvcc, nvcc_flags, report)
