"""Builds the three binaries of Marlin with ninja: see `build_tools/` for what and how."""

import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # an isolated build does not have the working folder on its path

from build_tools.ninja_file import run_ninja  # noqa: E402
from build_tools.plan import plan_build  # noqa: E402

LIBRARIES = ("_ops", "_ops_cuda", "host")
REPORT = "_build.json"


class BuildWithNinja(build_ext):
    """Hands the compiling to ninja, and to setuptools the finished files to place."""

    def run(self):
        plan = plan_build(ROOT)
        self.built = run_ninja(plan, ROOT / "build" / "ninja")
        self.extensions[:] = [e for e in self.extensions if short_name(e) in self.built]
        super().run()
        places = [Path(self.build_lib) / "marlin"] + ([ROOT / "marlin"] if self.inplace else [])
        for place in places:
            (place / REPORT).write_text(plan.report_text())
            for name in set(LIBRARIES) - set(self.built):  # from an earlier build with CUDA
                (place / f"{name}.so").unlink(missing_ok=True)

    def build_extension(self, ext):
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.copy_file(str(self.built[short_name(ext)]), str(target))

    def get_ext_filename(self, fullname):
        # The operator libraries know neither Python nor its version: no tag in their names.
        if fullname.split(".")[-1].startswith("_ops"):
            return str(Path(*fullname.split("."))) + ".so"
        return super().get_ext_filename(fullname)


def short_name(ext: Extension) -> str:
    return ext.name.removeprefix("marlin.")


setup(
    ext_modules=[Extension(f"marlin.{name}", []) for name in LIBRARIES],
    cmdclass={"build_ext": BuildWithNinja},
)
