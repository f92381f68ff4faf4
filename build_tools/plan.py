"""What is built: three libraries, their sources and flags, and why CUDA may be missing.

Environment variables:
    MARLIN_BUILD_CUDA   1: fail without nvcc; 0: CPU only; unset: build the CUDA library if nvcc
                        is there.
    MARLIN_CUDA_ARCHS   architectures to narrow to, e.g. "9.0a" or "8.0;8.0+PTX"
    CUDA_HOME           where the toolkit lies, if nvcc is not on PATH
    MARLIN_RACECHECK    1: kernels that compute-sanitizer's racecheck can follow (pipeline/ring.cuh)
    NVCC_APPEND_FLAGS   nvcc itself reads it: "-lineinfo" lets profilers show the source
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

# Machine code for Ampere, Ada and Hopper; PTX of 8.0 for everything newer (PTX of 9.0a would run
# nowhere else).
DEFAULT_ARCHS = "8.0;8.6;8.9;9.0a;8.0+PTX"
SM90_ARCH = "9.0a"

# The oldest LibTorch stable ABI that has all we call; a library built so loads in any newer torch.
TORCH_TARGET_VERSION = "0x020a000000000000"

CXX_FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast",
             "-Wall", "-Wextra", "-Wno-psabi", "-Icsrc"]  # fmt: skip

NVCC_FLAGS = ["-std=c++20", "-O3", "-Icsrc", "--expt-relaxed-constexpr",
              "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall"]  # fmt: skip

USUAL_CUDA_HOME = Path("/usr/local/cuda")
OLDEST_NVCC = (12, 4)

# cpu/isa_NAME.cpp is compiled for NAME alone.
ISA_FLAGS = {
    "csrc/cpu/isa_avx2.cpp": ["-mavx2", "-mfma"],
    "csrc/cpu/isa_avx512.cpp": ["-mavx512f", "-mavx512vl", "-mavx512dq", "-mavx512bw", "-mfma"],
}

SELECTION = [
    "csrc/dispatch/costs.cpp",
    "csrc/dispatch/measured.cpp",
    "csrc/dispatch/select.cpp",
]

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
    nvcc_flags: list[str]  # beside the architectures
    archs: str
    report: dict  # becomes marlin/_build.json, which `marlin info` and errors read

    def archs_of(self, source: str) -> str:
        """What a source is compiled for: kernels for the GPUs that use them."""
        return SM90_ARCH if is_sm90(source) else self.archs

    def flags_for(self, source: str) -> list[str]:
        """nvcc's flags for a source."""
        return self.nvcc_flags + arch_flags(self.archs_of(source))

    def report_text(self) -> str:
        return json.dumps(self.report, indent=2) + "\n"


def is_sm90(source: str) -> bool:
    """Whether a source holds kernels of the sm_90 engine."""
    return Path(source).name.startswith("sm90_")


def find_nvcc() -> str | None:
    """The CUDA compiler, from CUDA_HOME or PATH or the usual place."""
    named = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    candidates = [
        *(Path(home) / "bin" / "nvcc" for home in named if home),
        *(Path(found) for found in [shutil.which("nvcc")] if found),
        USUAL_CUDA_HOME / "bin" / "nvcc",
    ]
    return next((str(c) for c in candidates if c.exists()), None)


def nvcc_version(nvcc: str) -> tuple[int, int] | None:
    """None for something that does not answer as nvcc does."""
    run = subprocess.run([nvcc, "--version"], capture_output=True, text=True)
    found = re.search(r"release (\d+)\.(\d+)", run.stdout)
    return (int(found[1]), int(found[2])) if found else None


def arch_flags(archs: str) -> list[str]:
    """nvcc flags for "8.0;9.0a;8.0+PTX": machine code for each, PTX where asked for."""
    flags = []
    for arch in archs.split(";"):
        found = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", arch.strip())
        if not found:
            raise SystemExit(f"MARLIN_CUDA_ARCHS: expected e.g. '8.0;9.0a;8.0+PTX', got '{archs}'")
        number = found[1] + found[2]
        kind = "compute" if found[3] else "sm"
        flags.append(f"-gencode=arch=compute_{number},code={kind}_{number}")
    return flags


def why_no_cuda(nvcc: str | None, torch_lib: Path) -> str | None:
    """The reason for which the CUDA library is not built, or None if it is."""
    wanted = os.environ.get("MARLIN_BUILD_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"MARLIN_BUILD_CUDA: expected 0, 1 or nothing, got '{wanted}'")
    if wanted == "0":
        return "MARLIN_BUILD_CUDA=0 was set when marlin was built"
    if nvcc is None:
        return "nvcc was not found (on PATH or under CUDA_HOME) when marlin was built"
    version = nvcc_version(nvcc)
    if version is None:
        return f"{nvcc} --version failed"
    if version < OLDEST_NVCC:
        oldest = "{}.{}".format(*OLDEST_NVCC)
        return "nvcc {}.{} is too old: {} or newer is needed".format(*version, oldest)
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
    ]
    link_torch = [f"-L{torch_lib}", "-ltorch_cpu", "-ltorch", "-lc10"]
    border = ["csrc/torch/checks.cpp", "csrc/torch/columns.cpp", "csrc/torch/tensors.cpp"]
    libraries = [
        Library(
            "_ops",
            [
                "csrc/torch/library.cpp",
                "csrc/torch/cpu_ops.cpp",
                "csrc/torch/cpu_columns.cpp",
                *border,
                *CPU_SOURCES,
            ],
            torch_flags,
            link_torch,
        ),
        Library(
            "host",
            ["csrc/bindings/module.cpp", *SELECTION, *CPU_SOURCES],
            [f"-isystem{pybind11.get_include()}", f"-isystem{sysconfig.get_path('include')}"],
            ["-lpthread"],
        ),
    ]
    archs = os.environ.get("MARLIN_CUDA_ARCHS") or DEFAULT_ARCHS
    nvcc_flags = []
    report = {"cuda": missing is None, "why_no_cuda": missing, "torch": torch.__version__}
    if missing is None:
        cuda_home = Path(nvcc).resolve().parent.parent
        found = [*root.glob("csrc/dispatch/*.cpp"), *root.glob("csrc/**/*.cu")]
        sources = sorted(str(path.relative_to(root)) for path in found)
        with_sm90 = SM90_ARCH in (arch.strip() for arch in archs.split(";"))
        if not with_sm90:
            sources = [source for source in sources if not is_sm90(source)]
        defines = ["-DUSE_CUDA", *(["-DMARLIN_SM90"] if with_sm90 else [])]
        runtime = ["-lcudart_static", "-lrt", "-ldl", "-lpthread"]
        libraries.append(
            Library(
                "_ops_cuda",
                [
                    "csrc/torch/cuda_ops.cpp",
                    "csrc/torch/cuda_dense.cpp",
                    "csrc/torch/cuda_columns.cpp",
                    *border,
                    *sources,
                ],
                [*torch_flags, *defines, f"-isystem{cuda_home / 'include'}"],
                [*link_torch, "-ltorch_cuda", f"-L{cuda_home / 'lib64'}", *runtime],
            )
        )
        version = nvcc_version(nvcc)
        arch_flags(archs)  # refuses what is none
        nvcc_flags = list(NVCC_FLAGS)
        if version >= (12, 8):  # the first that knows it
            nvcc_flags.append("--compress-mode=size")
        if os.environ.get("MARLIN_RACECHECK") == "1":
            nvcc_flags.append("-DMARLIN_RACECHECK")
        report |= {"nvcc": "{}.{}".format(*version), "archs": archs}
    cxx = os.environ.get("CXX", "g++")
    return BuildPlan(root, libraries, cxx, nvcc, nvcc_flags, archs, report)
