"""Modules that go somewhere and come back as they were."""

import pytest
import torch
from torch import nn

from gptq.visit import Visit, read_ahead


def module():
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).half()
    layer.add_module("tied", nn.Linear(4, 4, bias=False).half())
    layer.tied.weight = layer[0].weight
    return layer


def tensors(layer):
    return {**dict(layer.named_parameters()), **dict(layer.named_buffers())}


def test_everything_comes_back():
    layer = module()
    before = {name: (tensor, tensor.data_ptr()) for name, tensor in tensors(layer).items()}
    with Visit(layer.modules(), "cpu", torch.float32) as visit:
        visit.bring()
        there = tensors(layer)
        assert all(t.dtype == torch.float32 for t in there.values() if t.is_floating_point())
        assert layer[1].num_batches_tracked.dtype == torch.int64
        assert layer.tied.weight is layer[0].weight
        with torch.no_grad():
            layer[0].bias.zero_()
    after = tensors(layer)
    assert after.keys() == before.keys()
    for name, tensor in after.items():
        assert tensor is before[name][0] and tensor.data_ptr() == before[name][1], name
    assert layer[0].bias.abs().sum() > 0


def test_it_comes_back_after_an_error_too():
    layer = module()
    with pytest.raises(KeyError), Visit(layer.modules(), "cpu", torch.float32) as visit:
        visit.bring()
        raise KeyError
    assert all(p.dtype == torch.float16 for p in layer.parameters())


def test_what_was_changed_stays_changed_and_what_has_left_is_left_alone():
    layer = module()
    left = layer[1]
    with Visit(layer.modules(), "cpu", torch.float32) as visit:
        visit.bring()
        visit.change(layer[0].weight, torch.full((4, 4), 3.0))
        layer[1] = nn.Identity()
        visit.forget_all_but(layer.parameters())
    assert (layer[0].weight == 3).all() and (layer.tied.weight == 3).all()
    assert layer[0].bias.dtype == torch.float16
    assert left.weight.dtype == torch.float32


@pytest.mark.gpu
def test_to_the_gpu_and_back():
    layer = module()
    before = {name: tensor.data_ptr() for name, tensor in tensors(layer).items()}
    values = {name: tensor.clone() for name, tensor in tensors(layer).items()}
    with Visit(layer.modules(), "cuda") as visit:
        visit.bring(read_ahead(layer.modules()))
        for name, tensor in tensors(layer).items():
            assert tensor.is_cuda and tensor.dtype == values[name].dtype
            assert torch.equal(tensor.cpu(), values[name])
        visit.change(layer[0].bias, torch.ones(4))
    after = tensors(layer)
    assert {name for name in after if after[name].data_ptr() != before[name]} == {"0.bias"}
    assert torch.equal(layer[0].bias, torch.ones(4).half()) and not layer[0].bias.is_cuda
