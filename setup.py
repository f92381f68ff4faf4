"""Builds the three binaries of Marlin with ninja: see `build_tools/` for what and how."""

import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

from build_tools.plan import plan_build  # noqa: E402
from build_tools.ninja_file import run_ninja  # noqa: E402


class BuildWithNinja(build_ext):
    """Hands the compiling to ninja, and to setuptools the finished files to place."""

    def run(self):
        self.build_plan = plan_build(ROOT)
        self.built = run_ninja(self.build_plan, ROOT / "build" / "ninja")
        names = {f"marlin.{library.name}" for library in self.build_plan.libraries}
        self.extensions[:] = [ext for ext in self.extensions if ext.name in names]
        super().run()

    def build_extension(self, ext):
        source = self.built[ext.name.removeprefix("marlin.")]
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.copy_file(str(source), str(target))

    def get_ext_filename(self, fullname):
        # The operator libraries know neither Python nor its version: no tag in their names.
        if fullname.split(".")[-1].startswith("_ops"):
            return str(Path(*fullname.split("."))) + ".so"
        return super().get_ext_filename(fullname)


setup(
    ext_modules=[Extension(f"marlin.{name}", []) for name in ("_ops", "_ops_cuda", "host")],
    cmdclass={"build_ext": BuildWithNinja},
)
