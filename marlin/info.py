"""What `marlin info` tells: what was built, what loads, and what this machine can run."""

import ctypes
import platform
from pathlib import Path

import torch

import marlin
from marlin import libraries


def collect() -> dict:
    """The report as plain values; `None` under a `why_…` key means that nothing is wrong."""
    build = libraries.build_report()
    return {
        "version": marlin.__version__,
        "folder": str(Path(marlin.__file__).parent),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "built_with": {key: build.get(key) for key in ("torch", "nvcc", "archs")},
        "cpu": {"threads": torch.get_num_threads(), **cpu_kernels()},
        "why_no_operators": why_no_operators(),
        "why_no_cuda": why_no_cuda(),
        "why_no_gpu": why_no_gpu(),
        "gpus": [describe_gpu(i, build) for i in range(torch.cuda.device_count())],
    }


def why_no_operators() -> str | None:
    """Why nothing can be computed; `import marlin` raises that, unless it is for the command."""
    try:
        from marlin import ops  # noqa: F401
    except ImportError as error:
        return without_name(error)
    return None


def without_name(error: ImportError) -> str:
    return str(error).removeprefix("marlin: ")


def why_no_cuda() -> str | None:
    if why_no_operators():
        return "the operators did not load"
    from marlin import ops

    return ops.why_no_cuda()


def cpu_kernels() -> dict:
    """The instruction sets of the CPU backend, which only the NumPy module lists."""
    try:
        for path in libraries.HERE.glob("host.*.so"):
            libraries.check_length(path)
        from marlin import host
    except ImportError as error:
        return {"kernels": None, "why_no_host": f"no marlin.host: {without_name(error)}"}
    return {"kernels": host.cpu_kernels(), "why_no_host": None}


def why_no_gpu() -> str | None:
    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) has no CUDA"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return None


def describe_gpu(index: int, build: dict) -> dict:
    capability = torch.cuda.get_device_capability(index)
    runs = code_for(capability, build.get("archs") or "")
    old_driver = why_driver_too_old(driver_cuda_version(), build)
    why_not = why_no_cuda() or old_driver or (None if runs else why_no_code(capability, build))
    return {
        "name": torch.cuda.get_device_name(index),
        "capability": "{}.{}".format(*capability),
        "runs": runs,
        "engine": engine_for(capability, build.get("archs") or ""),
        "why_not": why_not,
    }


def engine_for(capability: tuple[int, int], archs: str) -> str:
    """The engine that a GPU's products take: Hopper's own needs machine code of 9.0a."""
    own = capability[0] == 9 and "9.0a" in map(str.strip, archs.split(";"))
    return "sm_90 engine" if own else "sm_80 engine"


def why_no_code(capability: tuple[int, int], build: dict) -> str:
    if capability < (8, 0):
        return "compute capability 8.0 or newer is needed"
    return f"this build has code for {build.get('archs')} only: see MARLIN_CUDA_ARCHS"


def driver_cuda_version() -> int:
    """The newest CUDA that the driver knows, 13000 for 13.0. Only where torch sees a device."""
    version = ctypes.c_int()
    ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    return version.value


def why_driver_too_old(driver: int, build: dict) -> str | None:
    """A static runtime needs a driver that knows its major version of CUDA."""
    needed = int((build.get("nvcc") or "0").split(".")[0])
    if driver // 1000 >= needed:
        return None
    known = f"{driver // 1000}.{driver % 1000 // 10}"
    return f"the driver knows CUDA up to {known}, this build needs {needed}.0"


def code_for(capability: tuple[int, int], archs: str) -> str | None:
    """Which of a build's architectures ("8.0;9.0a;8.0+PTX") a GPU runs; None if none of them.

    Machine code runs on its own and later minor versions of its major one, that of "9.0a" on 9.0
    alone; PTX is compiled by the driver for anything that is not older.
    """
    machine_code, ptx = [], []
    for arch in filter(None, map(str.strip, archs.split(";"))):
        number = arch.removesuffix("+PTX")
        version = tuple(int(part) for part in number.rstrip("af").split("."))
        if number.endswith("a"):
            fits = version == capability
        elif arch.endswith("+PTX"):
            fits = version <= capability
        else:
            fits = version[0] == capability[0] and version <= capability
        if fits:
            (ptx if arch.endswith("+PTX") else machine_code).append((version, number))
    if machine_code:
        return f"machine code for {max(machine_code)[1]}"
    return f"PTX for {max(ptx)[1]}, compiled by the driver" if ptx else None


def describe(report: dict) -> str:
    """The report as lines for people."""
    built, cpu = report["built_with"], report["cpu"]
    compiler = f"nvcc {built['nvcc']} for {built['archs']}" if built["nvcc"] else "no nvcc"
    kernels = ", ".join(cpu["kernels"]) if cpu["kernels"] else cpu["why_no_host"]
    lines = [
        ("marlin", f"{report['version']} in {report['folder']}"),
        ("built with", f"torch {built['torch']}, {compiler}"),
        ("runs in", f"torch {report['torch']}, Python {report['python']}"),
        ("CPU", f"{cpu['threads']} threads; kernels, fastest first: {kernels}"),
        ("operators", report["why_no_operators"] or "loaded"),
        ("CUDA", report["why_no_cuda"] or "operators loaded"),
    ]
    if report["why_no_gpu"]:
        lines.append(("GPU", report["why_no_gpu"]))
    for index, gpu in enumerate(report["gpus"]):
        works = f"runs the {gpu['engine']}, {gpu['runs']}"
        verdict = f"cannot run: {gpu['why_not']}" if gpu["why_not"] else works
        lines.append((f"cuda:{index}", f"{gpu['name']} ({gpu['capability']}): {verdict}"))
    return "\n".join(f"{name:<12}{text}" for name, text in lines)
