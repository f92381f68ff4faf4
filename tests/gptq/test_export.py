"""What a model may be like that is loaded, and what is said of one that is not."""

import json
import shutil

import pytest
import torch
from models import save, save_gguf
from safetensors.torch import load_file, save_file

from gptq import cli, export

UP = "model.layers.1.mlp.up_proj.weight"
CONVERT = "pickles are not read: convert them to safetensors first"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    save("llama", folder / "model")
    (folder / "text.txt").write_text("for name in names:\n    print(name)\n" * 20)
    return folder / "model"


@pytest.fixture
def model(whole, tmp_path):
    """A copy, to be spoiled."""
    return shutil.copytree(whole, tmp_path / "model")


def tensors(model):
    return {n: t.clone() for n, t in load_file(model / "model.safetensors").items()}


def rewrite(model, state):
    save_file(state, model / "model.safetensors", {"format": "pt"})


def lacks_a_weight(model):
    state = tensors(model)
    del state[UP]
    rewrite(model, state)


def has_weights_of_other_shapes(model):
    rewrite(model, tensors(model) | {"model.norm.weight": torch.ones(5)})


def is_truncated(model):
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def has_an_odd_value(model):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"hidden_size": "x"}))


def has_an_unknown_activation(model):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"hidden_act": "nope"}))


def names_no_model(model):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"architectures": ["Trainer"]}))


def is_a_list(model):
    (model / "config.json").write_text("[1]")


def is_a_pickle(model):
    torch.save(tensors(model), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()


def is_a_pickle_by_its_index(model):
    is_a_pickle(model)
    save_file({"x": torch.ones(1)}, model / "other.safetensors")
    index = {"metadata": {}, "weight_map": {UP: "pytorch_model.bin"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def is_a_pickle_by_its_configuration(model):
    torch.save(tensors(model), model / "adapter_model.bin")
    config = json.loads((model / "config.json").read_text())
    config["transformers_weights"] = "adapter_model.bin"
    (model / "config.json").write_text(json.dumps(config))


def has_no_weights(model):
    (model / "model.safetensors").unlink()


SPOIL = {
    lacks_a_weight: f"expected the weights that its configuration describes; missing: {UP}",
    has_weights_of_other_shapes: "of another shape: model.norm.weight (5,) rather than (64,)",
    is_truncated: "incomplete metadata, file not fully covered",
    has_an_odd_value: "'hidden_size' expected int, got str",
    has_an_unknown_activation: "KeyError('nope')",
    names_no_model: "transformers has no model 'Trainer'",
    is_a_list: "config.json: expected an object, got list",
    is_a_pickle: f"expected weights in safetensors files, found pytorch_model.bin; {CONVERT}",
    is_a_pickle_by_its_index: "bad file name 'pytorch_model.bin'",
    is_a_pickle_by_its_configuration: f"found adapter_model.bin; {CONVERT}",
    has_no_weights: "expected weights in safetensors files, found none",
}


@pytest.mark.parametrize("command", ["quantize", "eval"])
@pytest.mark.parametrize("spoil", SPOIL, ids=lambda spoil: spoil.__name__)
def test_a_model_that_is_not_whole_is_one_line(
    spoil, command, whole, model, tmp_path, capsys, monkeypatch
):
    spoil(model)
    monkeypatch.setattr(torch, "load", lambda *args, **more: pytest.fail("a pickle was read"))
    options = {
        "quantize": ["--out", str(tmp_path / "out"), "--group-size", "32", "--method", "rtn"],
        "eval": ["--text", str(whole.parent / "text.txt")],
    }
    assert cli.main([command, str(model), "--device", "cpu", *options[command]]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"marlin: error: {model}") and SPOIL[spoil] in last
    assert not (tmp_path / "out").exists()


def test_many_missing_weights_are_counted(model):
    rewrite(model, {n: t for n, t in tensors(model).items() if "mlp" not in n})
    with pytest.raises(export.ModelError, match=r"missing: model.*_proj\.weight and 4 more$"):
        export.load_model(str(model))


def test_a_hub_without_safetensors_files(model, monkeypatch):
    def refuse(**options):
        assert options["use_safetensors"] is True
        raise OSError("no model.safetensors. Please do not set `use_safetensors=True`.")

    monkeypatch.setattr(export.transformers.LlamaForCausalLM, "from_pretrained", refuse)
    with pytest.raises(export.ModelError, match=f"in safetensors files; {CONVERT}$"):
        export.load_model(str(model))


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3", "gpt2", "mixtral", "bert"])
def test_nothing_is_missing_of_what_is_whole(name, tmp_path):
    """Tied weights and buffers among it."""
    original = save(name, tmp_path / "model")
    loaded = export.load_model(str(tmp_path / "model"), apart=True)
    state = original.state_dict()
    assert state.keys() == loaded.state_dict().keys()
    for key, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, state[key]), key


def test_nothing_is_missing_of_a_gguf_file(tmp_path):
    pytest.importorskip("gguf")
    original = save_gguf(tmp_path / "tiny.gguf")
    loaded = export.load_model(str(tmp_path / "tiny.gguf"))
    assert torch.equal(loaded.lm_head.weight, original.lm_head.weight)


def test_weights_that_a_gguf_file_lacks_are_named(tmp_path, monkeypatch):
    gguf = pytest.importorskip("gguf")
    add = gguf.GGUFWriter.add_tensor
    monkeypatch.setattr(
        gguf.GGUFWriter,
        "add_tensor",
        lambda self, name, *rest: "blk.1.ffn_up" in name or add(self, name, *rest),
    )
    save_gguf(tmp_path / "tiny.gguf")
    with pytest.raises(export.ModelError, match=f"missing: {UP}"):
        export.load_model(str(tmp_path / "tiny.gguf"))


def test_rounding_says_that_a_tokenizer_is_damaged(model, tmp_path, capsys):
    (model / "tokenizer.json").write_text("{}")
    arguments = ["quantize", str(model), "--group-size", "32", "--device", "cpu"]
    assert cli.main([*arguments, "--out", str(tmp_path / "a"), "--method", "rtn"]) == 0
    assert f"will have no tokenizer: {model}: no tokenizer; " in capsys.readouterr().out
    assert cli.main([*arguments, "--out", str(tmp_path / "b")]) == 2
    assert f"error: {model}: no tokenizer; " in capsys.readouterr().err.splitlines()[-1]


def test_an_encoder_may_lack_its_pooler(tmp_path):
    save("bert", tmp_path / "model")
    state = tensors(tmp_path / "model")
    pooler = [name for name in state if name.startswith("pooler.")]
    assert pooler
    rewrite(tmp_path / "model", {n: t for n, t in state.items() if n not in pooler})
    assert export.load_model(str(tmp_path / "model"))


def test_a_configuration_is_part_of_what_a_model_is(tmp_path):
    save("llama", tmp_path / "model")
    before = export.identity(str(tmp_path / "model"), None)
    path = tmp_path / "model" / "config.json"
    path.write_text(path.read_text().replace("}", " }"))
    assert export.identity(str(tmp_path / "model"), None) != before


def test_an_index_beside_a_whole_file_is_not_looked_at(tmp_path):
    save("llama", tmp_path / "model")
    index = {"weight_map": {"x": "pytorch_model.bin"}}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "model" / "adapter_model.bin").write_bytes(b"no adapter without its configuration")
    assert export.load_model(str(tmp_path / "model"))


def test_a_model_with_an_adapter_beside_it_is_refused(tmp_path):
    save("llama", tmp_path / "model")
    (tmp_path / "model" / "adapter_config.json").write_text("{}")
    (tmp_path / "model" / "weights.gguf").touch()
    config = export.load_config(str(tmp_path / "model"))
    for source in (tmp_path / "model", tmp_path / "model" / "weights.gguf"):
        with pytest.raises(export.ModelError, match=r"found an adapter.*merge it"):
            export.skeleton(str(source), config)
