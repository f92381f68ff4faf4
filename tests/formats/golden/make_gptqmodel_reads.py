"""Writes gptqmodel-reads.json: what GPTQModel makes of checkpoints that we wrote.

GPTQModel and its path as for make_gptqmodel.py, with marlin's repository in the path too, and
optimum==2.3.0 among the dependencies, through which transformers uses GPTQModel. GPTQModel loads
each checkpoint of `for_others` as a whole; recorded are the configuration it was given, and
digests of the tensors it was given and of the values that its layers dequantize to.

GPTQModel refuses version 1 with zero points unless the checkpoint says that GPTQModel made it,
since others once stored them differently. That is recorded as `refused`; what its layers would
have read is then tried on a copy that says so.

Under `transformers` is what its plain `from_pretrained` makes of the same checkpoint: the kernel
that was chosen, and how far the logits are from those of a dense model with the same values.
"""

import json
import tempfile
from importlib.metadata import version
from pathlib import Path

import by_definition as by
import for_others
import torch
from gptqmodel import BACKEND, GPTQModel
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, GPTQConfig, PreTrainedTokenizerFast

# GPTQModel insists on a tokenizer, and on one that has an end.
words = models.WordLevel({"a": 0, "<unk>": 1, "</s>": 2}, unk_token="<unk>")
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(words), eos_token="</s>", unk_token="<unk>"
)


def load(directory: Path):
    return GPTQModel.load(
        str(directory), device="cpu", backend=BACKEND.TORCH, dtype=torch.float16
    ).model.eval()


def claim(directory: Path) -> None:
    """Has the configuration say that GPTQModel made the checkpoint."""
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"]["meta"] = {"quantizer": ["gptqmodel:7.7.0"]}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "quantize_config.json").write_text(json.dumps(config["quantization_config"]))


def through_transformers(directory: Path, weights: dict, dense: dict) -> dict:
    """What `from_pretrained` tells of the checkpoint, and how far its logits are from the truth.

    Where the kernel that is chosen on this machine refuses (as on the CPU those for groups of 32 to
    256 refuse others), the one that GPTQModel calls torch is asked for.
    """
    load = AutoModelForCausalLM.from_pretrained
    model, report = load(directory, output_loading_info=True)
    if missing := sorted(report["missing_keys"]):
        return {"missing": missing}
    refused = None
    try:
        logits = model(by.TOKENS).logits.float()
    except RuntimeError as error:
        refused = str(error)
        model = load(directory, quantization_config=GPTQConfig(bits=4, backend="torch"))
        logits = model(by.TOKENS).logits.float()
    expected = by.llama_model(weights, dense)(by.TOKENS).logits.float()
    return {
        "missing": [],
        "refused": refused,
        "kernels": {name: type(model.get_submodule(name)).__name__ for name in weights},
        "difference": (logits - expected).abs().max().item(),
        "largest": expected.abs().max().item(),
    }


results = {}
for kind in for_others.KINDS:
    with tempfile.TemporaryDirectory() as folder:
        weights, dense = for_others.write(kind, Path(folder))
        directory = Path(folder) / "gptq"
        tokenizer.save_pretrained(directory)
        config = for_others.config_of(directory)
        tensors = load_file(directory / "model.safetensors")
        with torch.no_grad():
            plain = through_transformers(directory, weights, dense)
        refused = None
        try:
            model = load(directory)
        except ValueError as error:
            refused = str(error)
            claim(directory)
            model = load(directory)
        results[kind] = {
            "quantization_config": config,
            "refused": refused,
            "given": for_others.digests(tensors),
            "dequantized": {
                name: for_others.digest(layer.dequantize_weight())
                for name, layer in model.named_modules()
                if isinstance(layer, TorchLinear)
            },
            "transformers": plain,
        }
packages = ("gptqmodel", "optimum", "transformers", "torch")
results["versions"] = {package: version(package) for package in packages}
path = Path(__file__).with_name("gptqmodel-reads.json")
path.write_text(json.dumps(results, indent=1) + "\n")
