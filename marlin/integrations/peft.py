"""LoRA on Marlin layers: PEFT takes them as targets like any `nn.Linear`.

Importing this file tells PEFT; `import marlin` sees to it that this happens as soon as PEFT is
imported. PEFT has no register for layers that holds for every configuration, also for those that
it reads from disk, so two of its functions are replaced by ones that ask for Marlin layers first.
"""

from __future__ import annotations

from peft.tuners import tuners_utils
from peft.tuners.lora import model as lora_model
from peft.tuners.lora.layer import Linear
from transformers.pytorch_utils import Conv1D

from marlin.layer import MarlinLinear

dispatch_others = lora_model.dispatch_default
include_others = tuners_utils._maybe_include_all_linear_layers


class MarlinLoraLinear(Linear):
    """LoRA whose base is a `MarlinLinear`: trains and runs like PEFT's own, but does not merge."""

    lora_variants = {(): None}  # noqa: RUF012 (the others read or write a dense base weight)

    def _get_in_out_features(self, module: MarlinLinear) -> tuple[int, int]:
        return module.in_features, module.out_features

    def update_layer(self, adapter_name, r, lora_alpha, config, **kwargs) -> None:
        if config.init_lora_weights not in (True, False, "gaussian", "eva"):
            raise ValueError(
                f"init_lora_weights={config.init_lora_weights!r} reads or changes the base weight, "
                "which Marlin layers keep in 4 bits; expected True, False, 'gaussian' or 'eva'"
            )
        super().update_layer(adapter_name, r, lora_alpha, config, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        base = self.get_base_layer()
        if isinstance(base, MarlinLinear):
            raise ValueError(
                "an adapter cannot be merged into 4-bit weights: "
                "call dequantize() on the base model first"
            )
        self.fan_in_fan_out = isinstance(base, Conv1D)  # after dequantize() of a GPT-2
        super().merge(safe_merge, adapter_names)


def dispatch(target, adapter_name: str, config, parameter_name: str | None = None, **kwargs):
    """The LoRA layer for a target."""
    base = target.get_base_layer() if isinstance(target, tuners_utils.BaseTunerLayer) else target
    if isinstance(base, MarlinLinear) and parameter_name is None:
        return MarlinLoraLinear(target, adapter_name, config=config, **kwargs)
    return dispatch_others(target, adapter_name, config, parameter_name=parameter_name, **kwargs)


def include_all_linear_layers(config, model):
    """Spells out target_modules="all-linear": every linear layer but the model's head."""
    asked = getattr(config, "target_modules", None)
    config = include_others(config, model)
    if isinstance(asked, str) and asked.lower() == "all-linear":
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        config.target_modules |= {
            name
            for name, module in model.named_modules()
            if isinstance(module, MarlinLinear)
            and module is not head
            and not name.endswith(".base_layer")  # has an adapter: counted by the other function
        }
    return config


lora_model.dispatch_default = dispatch
tuners_utils._maybe_include_all_linear_layers = include_all_linear_layers
