"""Mixtures of experts in transformers, whose experts have Marlin layers of their own."""

import pytest
import torch
from tiny_models import IDS, assert_same, build, logits
from transformers import AutoModel, AutoModelForCausalLM

import marlin
from marlin.convert import convert
from marlin.experts import take_apart


@pytest.fixture(scope="module")
def model():
    model = build("mixtral")
    take_apart(model)
    marlin.quantize(model, 32)
    return model


@pytest.fixture(scope="module")
def directory(model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("mixture") / "marlin"
    marlin.save_pretrained(model, directory)
    return directory


def test_loads_what_marlin_wrote_and_back(model, directory, tmp_path):
    loaded = AutoModelForCausalLM.from_pretrained(directory)
    assert_same(loaded, model)
    assert torch.equal(logits(loaded), logits(model))
    loaded.save_pretrained(tmp_path)
    assert_same(marlin.load_pretrained(tmp_path), model)


def test_the_base_of_a_model_has_the_experts_too(model, directory):
    base = AutoModel.from_pretrained(directory)
    assert_same(base, model.model)
    with torch.no_grad():
        assert torch.equal(base(IDS).last_hidden_state, model.model(IDS).last_hidden_state)


@pytest.mark.parametrize("format", ["gptq", "compressed-tensors"])
def test_other_formats(format, model, directory, tmp_path):
    convert(directory, tmp_path / format, format)
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / format, quantization_config=marlin.MarlinConfig()
    )
    assert_same(loaded, model)
    assert torch.equal(logits(loaded), logits(model))


def test_dequantized_they_are_as_transformers_has_them(directory, tmp_path):
    dense = AutoModelForCausalLM.from_pretrained(directory)
    dense.dequantize()
    dense.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert "model.layers.1.mlp.experts.gate_up_proj" in dict(again.named_parameters())
    assert torch.equal(logits(again), logits(dense))
