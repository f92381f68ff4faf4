"""Writes the files beside it with GPTQModel, which was not installed but imported from its sources:

    pip download --no-deps --no-binary :all: gptqmodel==7.7.0 && tar xzf gptqmodel-7.7.0.tar.gz
    pip install --no-deps --target deps logbar device-smi tokenicer defuser pypcre threadpoolctl
    PYTHONPATH=deps:gptqmodel-7.7.0:tests/formats python tests/formats/golden/make_gptqmodel.py

Each file holds a layer as GPTQModel packs it, its configuration (in the metadata), and the codes,
zero points and values that went in.
"""

import itertools
import json
from pathlib import Path

import by_definition as by
import torch
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.quantization.config import QuantizeConfig
from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module
from safetensors.torch import save_file

K, N, GROUP = 64, 32, 32

for sym, act_order, version in itertools.product((True, False), (False, True), (1, 2)):
    weight = by.random_weight(K, N, K // GROUP, zeros=None if sym else (0, 15), act_order=act_order)
    weight.scales = weight.scales.abs() + 1e-3
    linear = torch.nn.Linear(K, N, bias=False)
    linear.weight.data = weight.values().t().float().contiguous()
    layer = TorchLinear(4, GROUP, sym, act_order, K, N)
    layer.pack_original(
        linear,
        weight.scales.t().contiguous().float(),
        torch.from_numpy(weight.zeros.T.copy()).float(),
        torch.from_numpy(weight.g_idx).int(),
    )
    config = QuantizeConfig(bits=4, group_size=GROUP, sym=sym, desc_act=act_order)
    values = config.to_dict()
    values["meta"] = {"quantizer": ["gptqmodel:7.7.0"]}
    values["checkpoint_format"] = "gptq" if version == 1 else "gptq_v2"
    values.pop("format", None)
    if version == 1:
        convert_gptq_v2_to_v1_format_module(layer, config)
    state = layer.state_dict()
    tensors = {part: state[part].clone() for part in ("qweight", "qzeros", "scales", "g_idx")}
    tensors["codes"] = torch.from_numpy(weight.codes).to(torch.uint8)
    tensors["zeros"] = torch.from_numpy(weight.zeros).to(torch.uint8)
    name = f"gptqmodel-v{version}{'' if sym else '-zeros'}{'-act-order' if act_order else ''}"
    text = json.dumps(values, default=str)
    path = Path(__file__).with_name(f"{name}.safetensors")
    save_file(tensors, path, metadata={"quantization_config": text})
