"""Modules that go somewhere and come back as they were."""

import pytest
import torch
from faults import always, out_of_memory_when
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


def test_after_an_error_on_the_way_it_can_be_tried_again(monkeypatch):
    layer = module()
    before = {name: tensor.data_ptr() for name, tensor in tensors(layer).items()}
    last = layer[1].num_batches_tracked.data_ptr()
    with Visit(layer.modules(), "cpu", torch.float32) as visit:
        with monkeypatch.context() as patch:
            full = lambda self, tensor: tensor.data_ptr() == last  # noqa: E731
            out_of_memory_when(full, patch, Visit, "_moved")
            with pytest.raises(torch.OutOfMemoryError):
                visit.bring()
        assert {name: tensor.data_ptr() for name, tensor in tensors(layer).items()} == before
        visit.bring()
        assert layer[0].weight.dtype == layer[1].running_mean.dtype == torch.float32
    assert {name: tensor.data_ptr() for name, tensor in tensors(layer).items()} == before


def test_without_memory_to_lock_nothing_is_read_ahead(monkeypatch):
    layer = module()
    out_of_memory_when(always, monkeypatch, torch, "empty_like")
    ahead = read_ahead(layer.modules())
    assert ahead.result() == {}
    with Visit(layer.modules(), "cpu", torch.float32) as visit:
        visit.bring(ahead)
        assert layer[0].weight.dtype == torch.float32


@pytest.mark.gpu
def test_values_from_host_memory_take_the_place_that_is_there():
    layer = module()
    with Visit(layer.modules(), "cuda") as visit:
        visit.bring()
        there = layer[0].weight.data_ptr()
        visit.change(layer[0].weight, torch.full((4, 4), 3.0))
        assert layer[0].weight.is_cuda and layer[0].weight.data_ptr() == there
    assert not layer[0].weight.is_cuda and (layer[0].weight == 3).all()


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
