"""`import marlin` adds itself to other libraries, in whichever order they are imported."""

import importlib
import os
import subprocess
import sys

import pytest

from marlin import integrations

REGISTERED = """
import sys
{first}
assert ("transformers" in sys.modules) == {transformers_first}
{second}
from transformers.quantizers import auto
assert auto.AUTO_QUANTIZER_MAPPING["marlin"].__name__ == "MarlinQuantizer"
assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["marlin"] is marlin.MarlinConfig
"""
ORDERS = {
    "marlin first": ("import marlin", ""),
    "transformers first": ("import transformers.quantizers.auto", "import marlin"),
}


@pytest.mark.parametrize("order", ORDERS)
def test_registered_in_any_order(order):
    first, second = ORDERS[order]
    code = REGISTERED.format(
        first=first, second=second, transformers_first=order == "transformers first"
    )
    run = subprocess.run([sys.executable, "-c", code], env=os.environ, capture_output=True)
    assert run.returncode == 0, run.stderr.decode()


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A package `library_x` with a module `part`, and what follows it, for the test to write."""
    (tmp_path / "library_x").mkdir()
    (tmp_path / "library_x" / "__init__.py").write_text("")
    (tmp_path / "library_x" / "part.py").write_text("values = ['own']\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(integrations, "FOLLOWERS", {"library_x.part": "follower_x"})
    yield tmp_path / "follower_x.py"
    for name in ("library_x", "library_x.part", "follower_x"):
        sys.modules.pop(name, None)


def test_a_follower_comes_after_the_whole_module(library):
    library.write_text("import library_x.part as p\np.values.append('ours')\n")
    part = importlib.import_module("library_x.part")
    assert part.values == ["own", "ours"]
    assert part.__file__ and part.__loader__.get_source("library_x.part")


def test_a_follower_may_be_imported_first(library):
    library.write_text("from library_x.part import values\nvalues.append('ours')\n")
    importlib.import_module("follower_x")
    assert sys.modules["library_x.part"].values == ["own", "ours"]


def test_a_follower_that_fails_spares_the_library(library):
    library.write_text("from library_x.part import what_an_old_version_lacks\n")
    with pytest.warns(UserWarning, match="this version of library_x is not supported.*lacks"):
        part = importlib.import_module("library_x.part")
    assert part.values == ["own"]


def test_a_module_that_fails_is_not_followed(library):
    library.write_text("raise SystemExit('followed')\n")
    (library.parent / "library_x" / "part.py").write_text("raise ValueError('broken')\n")
    with pytest.raises(ValueError, match="broken"):
        importlib.import_module("library_x.part")


def test_one_finder_is_enough():
    integrations.install()
    assert sum(isinstance(finder, integrations.Follow) for finder in sys.meta_path) == 1
