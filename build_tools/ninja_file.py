"""Writes the plan as a ninja file and runs it: objects are kept and tracked between builds."""

import os
import subprocess
from pathlib import Path

from ninja import BIN_DIR
from ninja.ninja_syntax import Writer

from build_tools.plan import CXX_FLAGS, ISA_FLAGS, BuildPlan

RULES = {
    "cxx": ("$cxx $flags -MMD -MF $out.d -c $in -o $out", "C++  $in"),
    "nvcc": ("$nvcc $flags -MD -MF $out.d -c $in -o $out", "CUDA $in"),
    "link": ("$cxx -shared -s -Wl,--exclude-libs,ALL $in -o $out $flags", "link $out"),
}


def write_ninja_file(plan: BuildPlan, folder: Path) -> dict[str, Path]:
    """Writes `folder`/build.ninja; returns each library's file by name."""
    outputs = {}
    with open(folder / "build.ninja", "w") as stream:
        ninja = Writer(stream, width=100)
        ninja.variable("builddir", str(folder))  # where ninja keeps its logs
        ninja.variable("cxx", plan.cxx)
        ninja.variable("nvcc", plan.nvcc or "nvcc")
        for name, (command, description) in RULES.items():
            depfile = None if name == "link" else "$out.d"
            ninja.rule(name, command, description=description, depfile=depfile,
                       deps="gcc" if depfile else None)  # fmt: skip
        for library in plan.libraries:
            objects = []
            for source in library.sources:
                is_cuda = source.endswith(".cu")
                flags = plan.flags_for(source) if is_cuda else CXX_FLAGS + library.flags
                flags = flags + ISA_FLAGS.get(source, [])
                target = str(folder / library.name / (source + ".o"))
                ninja.build(target, "nvcc" if is_cuda else "cxx", source,
                            variables={"flags": flags})  # fmt: skip
                objects.append(target)
            outputs[library.name] = folder / f"{library.name}.so"
            ninja.build(str(outputs[library.name]), "link", objects,
                        variables={"flags": library.link})  # fmt: skip
    return outputs


def run_ninja(plan: BuildPlan, folder: Path) -> dict[str, Path]:
    """Builds every library of the plan; returns each one's file by name."""
    folder.mkdir(parents=True, exist_ok=True)
    outputs = write_ninja_file(plan, folder)
    if plan.report["why_no_cuda"]:
        print(f"marlin: building without CUDA: {plan.report['why_no_cuda']}", flush=True)
    command = [str(Path(BIN_DIR) / "ninja"), "-f", str(folder / "build.ninja")]
    if jobs := os.environ.get("MAX_JOBS"):
        command += ["-j", jobs]
    result = subprocess.run(command, cwd=plan.root)
    if result.returncode:
        raise SystemExit("marlin: compiling failed; the compiler's message is above")
    return outputs
