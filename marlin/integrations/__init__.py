"""What Marlin adds to other libraries, when a program imports them.

`import marlin` must be quick and must not need these libraries, so it only leaves word: once one
of the modules below has been imported, by whomever, the file of ours beside it is imported too,
and adds itself.
"""

import importlib
import sys
import warnings
from collections.abc import Callable, Iterable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec

FOLLOWERS = {
    "transformers.quantizers.auto": "marlin.integrations.transformers",
    "peft.tuners.lora.model": "marlin.integrations.peft",
}


def install() -> None:
    """Follows every library of `FOLLOWERS`, those that are imported already included."""
    if any(isinstance(finder, Follow) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, Follow())
    for name in FOLLOWERS:
        if sys.modules.get(name) is not None:
            follow(name)


def adopt(model, transposed: Iterable[str]) -> None:
    """Has a transformers model's own `save_pretrained` and `dequantize` know its Marlin layers.

    `from_pretrained` does that by itself; this is for models that came by them in another way.
    Models that are not from transformers are left alone.

    transposed: names of layers that were a `Conv1D` before.
    """
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is not None and isinstance(model, modeling.PreTrainedModel):
        from marlin.integrations.transformers import MarlinConfig, MarlinQuantizer

        known = getattr(getattr(model, "hf_quantizer", None), "transposed", frozenset())
        model.hf_quantizer = MarlinQuantizer(MarlinConfig())
        model.hf_quantizer.transposed = known.union(transposed)


def follow(name: str) -> None:
    """Imports our part of a library. A failure is no reason for the library's import to fail."""
    try:
        importlib.import_module(FOLLOWERS[name])
    except Exception as error:
        warnings.warn(
            f"marlin: this version of {name.partition('.')[0]} is not supported: {error!r}",
            stacklevel=2,
        )


class Follow(MetaPathFinder):
    """Finds nothing itself, but adds `follow` to the loaders of the modules in `FOLLOWERS`."""

    def find_spec(self, name: str, path=None, target=None) -> ModuleSpec | None:
        if name not in FOLLOWERS:
            return None
        for finder in sys.meta_path:
            if isinstance(finder, Follow) or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader.exec_module = followed(spec.loader.exec_module, name)
                return spec
        return None


def followed(exec_module: Callable, name: str) -> Callable:
    def execute(module) -> None:
        exec_module(module)
        follow(name)

    return execute
