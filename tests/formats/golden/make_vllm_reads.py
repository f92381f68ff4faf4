"""Writes vllm-reads.json: what vLLM makes of checkpoints that we wrote, on a CPU with AVX-512.

vLLM 0.24.0 in an environment of its own, with marlin's repository in the path, and its sources
(vllm-0.24.0.tar.gz on PyPI) for the kernel for CPUs, which the package on PyPI was built without:

    PYTHONPATH=.:tests/formats python tests/formats/golden/make_vllm_reads.py vllm-0.24.0/csrc

vLLM loads each checkpoint of `for_others` as a whole: configuration, model, weights, and their
preparation for the kernel. Recorded are the configuration it was given, digests of the tensors it
was given, what it understood of each layer, and digests of what it then held: of a linear layer the
product with the identity, so its weight as the kernel for CPUs dequantizes it.
"""

import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import for_others
import torch
import vllm.platforms
from pydantic import ValidationError
from safetensors.torch import load_file
from torch.utils.cpp_extension import load_inline
from vllm.platforms.cpu import CpuPlatform

vllm.platforms.current_platform = CpuPlatform()  # before anything asks: the package knows GPUs only

from vllm.config import set_current_vllm_config  # noqa: E402
from vllm.distributed import (  # noqa: E402
    init_distributed_environment,
    initialize_model_parallel,
)
from vllm.engine.arg_utils import EngineArgs  # noqa: E402
from vllm.model_executor.layers.linear import LinearBase  # noqa: E402
from vllm.model_executor.model_loader import get_model  # noqa: E402

KERNEL = """
#include "cpu/utils.cpp"
#include "cpu/cpu_wna16.cpp"
TORCH_LIBRARY_FRAGMENT(_C, library) { library.def("cpu_gemm_wna16", &cpu_gemm_wna16); }
"""
AVX512 = [f"-mavx512{part}" for part in ("f", "vl", "bw", "dq")]
FLAGS = ["-O2", "-std=c++20", "-fopenmp", "-DVLLM_NUMA_DISABLED", *AVX512]


def configure(directory: Path):
    return EngineArgs(
        model=str(directory), dtype="float16", enforce_eager=True, skip_tokenizer_init=True
    ).create_engine_config()


def load(config):
    with set_current_vllm_config(config):
        if not torch.distributed.is_initialized():
            init_distributed_environment(1, 0, f"file://{tempfile.mkdtemp()}/store", 0, "gloo")
            initialize_model_parallel(1, 1)
        return get_model(vllm_config=config)


def linear_layers(model) -> dict[str, tuple[str | None, torch.Tensor]]:
    """By the checkpoint's names: what vLLM understood, None if not packed, and values (k, n)."""
    found = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, LinearBase):
            continue
        parent, _, leaf = name.rpartition(".")
        leaves = model.packed_modules_mapping.get(leaf, [leaf])
        sizes = getattr(layer, "output_sizes", [layer.output_size])
        values = layer.quant_method.apply(layer, torch.eye(layer.input_size, dtype=torch.half))
        kernel = getattr(getattr(layer, "scheme", layer.quant_method), "kernel", None)
        for leaf, part in zip(leaves, values.split(sizes, dim=1), strict=True):
            found[f"{parent}.{leaf}"] = (understood(kernel), part)
    return found


def understood(kernel) -> str | None:
    if kernel is None:
        return None
    c = kernel.config
    return f"{c.weight_type} group_size={c.group_size} act_order={c.has_g_idx}"


def read(kind: str, format: str, folder: Path) -> dict:
    for_others.write(kind, folder, format)
    tensors = load_file(folder / format / "model.safetensors")
    result = {
        "quantization_config": for_others.config_of(folder / format),
        "refused": None,
        "given": for_others.digests(tensors),
    }
    try:
        config = configure(folder / format)
    except ValidationError as error:
        return result | {"refused": error.errors()[0]["msg"]}
    model = load(config)
    layers = linear_layers(model)
    held = {name: values for name, (_, values) in layers.items()}
    for name, parameter in model.named_parameters():
        if name in tensors and name.rpartition(".")[0] not in layers:
            held[name] = parameter.data[: len(tensors[name])]  # it pads the vocabulary
    return result | {
        "method": config.model_config.quantization,
        "layers": {name: kind for name, (kind, _) in layers.items()},
        "held": for_others.digests(held),
    }


if __name__ == "__main__":
    load_inline(
        "vllm_cpu_kernel",
        [KERNEL],
        extra_include_paths=[sys.argv[1]],
        extra_cflags=FLAGS,
        is_python_module=False,
    )
    packages = ("vllm", "torch", "transformers", "compressed-tensors")
    results = {"versions": {name: version(name) for name in packages}}
    for format, kinds in for_others.GIVEN_TO_VLLM.items():
        results[format] = {}
        for kind in kinds:
            with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
                results[format][kind] = read(kind, format, Path(folder))
    path = Path(__file__).with_name("vllm-reads.json")
    path.write_text(json.dumps(results, indent=1) + "\n")
