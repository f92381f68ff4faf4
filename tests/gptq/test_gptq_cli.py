"""The commands as a user runs them; once each in a process of its own, the rest within this one."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from faults import always, at_first, out_of_memory_when
from models import DECODER, build, save, save_gguf, tokenizer
from transformers import AutoTokenizer

from demo import steps
from gptq import cli, evaluate, resume
from marlin.checkpoint import load_pretrained
from marlin.convert import convert
from marlin.layer import MarlinLinear

ROOT = Path(__file__).parents[2]
TEXT = "for name in names:\n    if name in seen:\n        continue\n    print(name)\n\n" * 12


def run(*arguments):
    command = [sys.executable, "-m", "gptq", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def call(*arguments):
    """The same without a new process, whose imports take seconds."""
    assert cli.main([str(argument) for argument in arguments]) == 0


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A model directory, a text, and the GPTQ checkpoint of the model that the tests look at."""
    folder = tmp_path_factory.mktemp("cli")
    save("llama", folder / "model")
    (folder / "text.txt").write_text(TEXT)
    (folder / "latin.txt").write_bytes("café".encode("latin-1"))
    finished = run(
        "quantize", folder / "model", "--out", folder / "gptq", "--group-size", 32,
        "--calibration", folder / "text.txt", "--nsamples", 6, "--seqlen", 64, "--device", "cpu",
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    (folder / "stdout").write_text(finished.stdout)
    (folder / "stderr").write_text(finished.stderr)
    return folder


def nll_of(model):
    return evaluate.evaluate(model, tokenizer(), [TEXT], seqlen=48).nll


def test_writes_a_checkpoint_that_loads_with_marlin_layers(work):
    model = load_pretrained(work / "gptq")
    layers = [module for module in model.modules() if isinstance(module, MarlinLinear)]
    assert len(layers) == 21 and all(layer.group_size == 32 for layer in layers)
    assert model.dtype == torch.float16
    assert model.lm_head.weight is model.model.embed_tokens.weight
    again = AutoTokenizer.from_pretrained(work / "gptq")
    assert again(TEXT).input_ids == tokenizer()(TEXT).input_ids


def test_says_what_it_will_and_will_not_do_before_it_starts(work):
    lines = (work / "stdout").read_text().splitlines()
    assert lines[0].startswith("To quantize: 21 linear layers in 3 blocks")
    assert lines[1] == "Full precision: lm_head (outside the decoder layers)"
    assert lines[2] == "Full precision: model.embed_tokens (embedding)"
    assert lines.index(f"Loading {work / 'model'}") > 2
    assert lines[3].startswith("Calibrating with 6 samples, ")
    assert "mlp.down_proj loss" in (work / "stderr").read_text()  # the progress bar


def test_reports_every_module(work):
    report = json.loads((work / "gptq" / "gptq_report.json").read_text())
    assert report["method"] == "gptq" and report["group_size"] == 32
    assert report["samples"] == 6 and report["tokens"] > 6 * 16
    assert len(report["modules"]) == 21
    for module in report["modules"]:
        assert 0 < module["loss"] < module["rtn_loss"]
        assert module["tokens"] == report["tokens"]
        assert module["damping"] >= 0.01 and module["seconds"] > 0 and module["note"] is None
        assert module["peak_bytes"] is None  # of GPU memory
    peaks = [module["peak_host_bytes"] for module in report["modules"]]
    assert peaks[0] > 0 and peaks == sorted(peaks) and peaks[-1] <= report["peak_host_bytes"]
    assert report["full_precision"]["lm_head"] == "outside the decoder layers"


def test_reports_for_people_too(work):
    lines = (work / "stdout").read_text().splitlines()
    kinds = [line.split()[0] for line in lines if line.split()[1:2] == ["3"]]
    assert kinds == [f"self_attn.{x}_proj" for x in "qkvo"] + [
        f"mlp.{x}_proj" for x in ("gate", "up", "down")
    ]
    report = json.loads((work / "gptq" / "gptq_report.json").read_text())
    assert f"Quantized 21 layers with {report['tokens']} tokens in" in lines[-2]
    phases = {"load", "forward", "factor", "solve", "loss", "write", "other"}
    assert set(report["phases"]) == phases
    page = (work / "gptq" / "gptq_report.md").read_text()
    assert f"- Calibration: 6 samples, {report['tokens']} tokens of" in page
    assert "| method | loss | rounding's | damping | tokens | seconds | peak | note |" in page
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| model.")]
    assert len(rows) == 21
    assert [float(row[3]) for row in rows] == pytest.approx(
        [module["loss"] for module in report["modules"]], rel=1e-3
    )
    assert [row[8] for row in rows] == [
        f"{module['peak_host_bytes'] / 1e9:.2f} GB" for module in report["modules"]
    ]
    assert "Peak: host memory of the whole process since it began" in page
    assert "- Full precision: lm_head (outside the decoder layers)" in page


def test_tokens_by_default_follow_the_model(work, capsys):
    """50 for each of the 160 inputs of the widest layer; the text has more."""
    call("quantize", work / "model", "--out", work / "default", "--group-size", 32,
         "--device", "cpu")  # fmt: skip
    report = json.loads((work / "default" / "gptq_report.json").read_text())
    assert report["tokens"] == 50 * 160
    assert f" {report['tokens']} tokens, of pydoc" in capsys.readouterr().out


def test_what_does_not_go_as_planned_is_said(work, capsys):
    call("quantize", work / "model", "--out", work / "few", "--group-size", 32, "--device", "cpu",
         "--calibration", work / "text.txt", "--tokens", 17, "--seqlen", 18)  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    assert "3 layers did not go as planned:" in lines
    index = lines.index("3 layers did not go as planned:")
    assert lines[index + 1] == (
        "  model.layers.0.mlp.down_proj: full-range rtn (only 17 tokens for 160 inputs)"
    )


def test_mixtures_of_experts(tmp_path, capsys):
    """Each expert gets linears, Hessians and a report of its own; those in need fall back."""
    model = save("mixtral", tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    call("quantize", tmp_path / "model", "--out", tmp_path / "out", "--group-size", 32,
         "--calibration", tmp_path / "text.txt", "--tokens", 60, "--seqlen", 30,
         "--device", "cpu")  # fmt: skip
    said = capsys.readouterr().out
    assert "To quantize: 36 linear layers in 3 blocks" in said
    assert "Note:" not in said  # hardly anything stays in full precision
    modules = json.loads((tmp_path / "out" / "gptq_report.json").read_text())["modules"]
    experts = [module for module in modules if ".experts." in module["name"]]
    starved = [module for module in experts if module["method"] == "full-range rtn"]
    assert 0 < len(starved) < len(experts) == 24
    for module in starved:
        assert module["tokens"] * 8 < module["k"]
        assert f"{module['name']}: full-range rtn ({module['note']})" in said
    packed = load_pretrained(tmp_path / "out", dtype=torch.float32)
    for module in modules:
        layer = packed.get_submodule(module["name"])
        linear = model.get_submodule(module["name"])
        assert isinstance(layer, MarlinLinear)
        with torch.no_grad():
            error = (layer.dequantize() - linear.weight).norm() / linear.weight.norm()
            linear.weight.copy_(layer.dequantize())
        assert error < 0.2
    ids = tokenizer()(TEXT, return_tensors="pt").input_ids[:, :64]
    with torch.no_grad():
        torch.testing.assert_close(
            packed(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-2, atol=1e-2
        )


def test_experts_of_an_unknown_kind_stay_and_are_named(tmp_path, capsys):
    config = transformers.Llama4TextConfig(
        **DECODER, num_local_experts=4, intermediate_size_mlp=96, head_dim=16
    )
    transformers.Llama4ForCausalLM(config).save_pretrained(tmp_path / "model")
    call("quantize", tmp_path / "model", "--out", tmp_path / "out", "--group-size", 32,
         "--method", "rtn", "--device", "cpu")  # fmt: skip
    said = capsys.readouterr().out
    assert "layers.2.feed_forward.experts (experts in one tensor, of a kind that is not" in said
    share = re.search(r"Note: (\d+)% of the weights stay in full precision", said)
    assert share and int(share[1]) > 50


def test_gptq_beats_rounding_on_its_own_text_and_eval_measures_it(work, capsys):
    call(
        "quantize", work / "model", "--out", work / "rtn", "--group-size", 32, "--method", "rtn",
        "--device", "cpu",
    )  # fmt: skip
    results = {}
    for name in ("model", "gptq", "rtn"):
        capsys.readouterr()
        call(
            "eval", work / name, "--text", work / "text.txt", "--seqlen", 48, "--json",
            "--device", "cpu",
        )  # fmt: skip
        results[name] = json.loads(capsys.readouterr().out)
    assert results["model"]["nll"] == pytest.approx(nll_of(build("llama")), rel=1e-5)
    packed = load_pretrained(work / "gptq", dtype=torch.float32)
    assert results["gptq"]["nll"] == pytest.approx(nll_of(packed), rel=1e-5)
    full, ours, rounded = (results[name]["nll"] for name in ("model", "gptq", "rtn"))
    assert abs(ours - full) < abs(rounded - full)


def test_eval_prints_for_people_too(work):
    finished = run("eval", work / "gptq", "--text", work / "text.txt", "--max-tokens", 60)
    assert finished.returncode == 0, finished.stderr
    assert [line.split()[0] for line in finished.stdout.splitlines()] == [
        "nll", "perplexity", "tokens",
    ]  # fmt: skip


def test_packed_layers_compute_what_was_solved(work):
    """The codes on disk, through the operators, against the dense weights they stand for."""
    packed = load_pretrained(work / "gptq", dtype=torch.float32)
    dense = build("llama")
    state = {k: v for k, v in packed.state_dict().items() if not k.endswith((".B", ".s"))}
    dense.load_state_dict(state, strict=False)
    for name, module in packed.named_modules():
        if isinstance(module, MarlinLinear):
            dense.get_submodule(name).weight.data = module.dequantize().float()
    ids = tokenizer()(TEXT, return_tensors="pt").input_ids[:, :64]
    with torch.no_grad():
        torch.testing.assert_close(
            packed(input_ids=ids).logits, dense(input_ids=ids).logits, rtol=1e-3, atol=3e-3
        )


def test_gguf_files(tmp_path):
    pytest.importorskip("gguf")
    original = save_gguf(tmp_path / "tiny.gguf")
    arguments = ("--group-size", 32, "--nsamples", 4, "--seqlen", 48, "--device", "cpu")
    call("quantize", tmp_path / "tiny.gguf", "--out", tmp_path / "out", *arguments)
    model = load_pretrained(tmp_path / "out", dtype=torch.float32)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "marlin"
    name = "model.layers.1.self_attn.q_proj"
    weight = original.get_submodule(name).weight
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (again.bos_token_id, again.eos_token_id) == (1, 2)
    assert again(TEXT, add_special_tokens=False).input_ids == (
        tokenizer()(TEXT, add_special_tokens=False).input_ids
    )
    error = model.get_submodule(name).dequantize() - weight
    assert error.norm() < 0.2 * weight.norm()  # the same weights, in the same order


@pytest.mark.parametrize("name, linears", [("gpt2", 12), ("bert", 18)])
def test_models_that_are_no_llama(name, linears, tmp_path):
    save(name, tmp_path / "model")
    call(
        "quantize", tmp_path / "model", "--out", tmp_path / "out", "--group-size", 32,
        "--nsamples", 4, "--seqlen", 48, "--device", "cpu", "--dtype", "bfloat16",
    )  # fmt: skip
    model = load_pretrained(tmp_path / "out", dtype=torch.float32)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, MarlinLinear)}
    assert len(layers) == linears
    original = build(name)
    for dotted, layer in layers.items():
        bias = original.get_submodule(dotted).bias
        torch.testing.assert_close(layer.bias, bias.detach(), rtol=1e-2, atol=1e-2)


def test_a_gpu_without_memory_is_helped_out_and_the_report_says_so(work, monkeypatch, capsys):
    """Packing is the last thing that happens to a linear; the rest is in test_memory.py."""
    common = ("quantize", work / "model", "--group-size", 32, "--method", "rtn", "--device", "cpu")
    call(*common, "--out", work / "roomy")
    out_of_memory_when(at_first(), monkeypatch, resume, "pack")
    capsys.readouterr()
    call(*common, "--out", work / "narrow")
    name, note = "model.layers.0.self_attn.q_proj", "CUDA out of memory: packed on the CPU"
    assert f"1 layers did not go as planned:\n  {name}: rtn ({note})" in capsys.readouterr().out
    modules = json.loads((work / "narrow" / "gptq_report.json").read_text())["modules"]
    assert {m["name"]: m["note"] for m in modules if m["note"]} == {name: note}
    page = (work / "narrow" / "gptq_report.md").read_text()
    assert next(line for line in page.splitlines() if note in line).startswith(f"| {name} |")
    weights = [(work / x / "model.safetensors").read_bytes() for x in ("roomy", "narrow")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    "module, name, arguments",
    [
        (cli.export, "load_model", ("quantize", "{work}/model", "--out", "{work}/x",
         "--group-size", "32", "--method", "rtn")),
        (cli.evaluate, "evaluate", ("eval", "{work}/model", "--text", "{work}/text.txt")),
    ],
)  # fmt: skip
def test_memory_that_runs_out_anywhere_else_is_one_line(
    module, name, arguments, work, monkeypatch, capsys
):
    out_of_memory_when(always, monkeypatch, module, name)
    assert cli.main([a.format(work=work) for a in arguments] + ["--device", "cpu"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "marlin: error: cpu: expected memory for the model and one sample, ran out; "
        "shorter samples (--seqlen) or --device cpu would do"
    )


QUANTIZE = ("quantize", "{work}/model", "--out", "{work}/x")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (QUANTIZE, "--group-size 32 takes every layer"),
        ((*QUANTIZE, "--group-size", "96"), "invalid choice"),
        ((*QUANTIZE, "--bits", "3"), "invalid choice"),
        ((*QUANTIZE, "--device", "gpu"), "expected cpu, cuda or cuda:N, got 'gpu'"),
        ((*QUANTIZE, "--device", "cuda:99"), "device: cuda:99, but torch sees"),
        ((*QUANTIZE, "--damping", "-1"), "argument --damping: expected 0 to 1, got -1"),
        ((*QUANTIZE, "--damping", "2"), "argument --damping: expected 0 to 1, got 2"),
        ((*QUANTIZE, "--damping", "nan"), "argument --damping: expected 0 to 1, got nan"),
        ((*QUANTIZE, "--damping", "x"), "invalid damping value: 'x'"),
        ((*QUANTIZE, "--sweeps", "-1"), "argument --sweeps: expected 0 or more, got -1"),
        (
            (*QUANTIZE, "--group-size", "32", "--skip", "*.q_proj", "--skip", "*.dwn_proj"),
            "skip: expected a pattern that some module's name matches, got '*.dwn_proj'",
        ),
        (("quantize", "{work}/model", "--out", "{work}/text.txt/x"), "that can be written"),
        ((*QUANTIZE, "--group-size", "32", "--calibration", "{work}/latin.txt"), "text in UTF-8"),
        ((*QUANTIZE, "--nsamples", "0"), "expected a positive number"),
        ((*QUANTIZE, "--group-size", "32", "--calibration", "{work}/none.txt"), "none.txt"),
        (("quantize", "{work}/model", "--out", "{work}/model"), "another directory"),
        (("quantize", "{work}/model", "--out", "{work}/model/a/b"), "another directory"),
        (("quantize", "{work}/gptq", "--out", "{work}/x"), "got quant_method 'marlin'"),
        (("quantize", "{work}/none", "--out", "{work}/x"), "a hub id or a .gguf file"),
        (("quantize", "{work}/none.gguf", "--out", "{work}/x"), "expected a .gguf file"),
        (("eval", "{work}/model", "--text", "{work}/none.txt"), "expected a file or 'pydoc'"),
        (("eval", "{work}/model"), "--text"),
        ((), "COMMAND"),
    ],
)
def test_bad_input_is_one_line_and_status_two(work, arguments, message, capsys):
    try:
        status = cli.main([argument.format(work=work) for argument in arguments])
    except SystemExit as leaving:  # argparse's own errors
        status = leaving.code
    assert status == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (work / "x").exists()


@pytest.mark.parametrize("more", [(), ("--resume",), ("--restart",)])
@pytest.mark.parametrize("what", ["another model", "a finished checkpoint", "a file"])
def test_what_lies_there_is_not_replaced_without_asking(what, more, work, tmp_path, capsys):
    out = tmp_path / "out"
    if what == "another model":
        shutil.copytree(work / "model", out)
    elif what == "a finished checkpoint":
        shutil.copytree(work / "gptq", out)
    else:
        out.mkdir()
        (out / "notes.txt").write_text("mine")
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    arguments = ["quantize", work / "model", "--out", out, "--group-size", 32, "--method", "rtn",
                 "--device", "cpu"]  # fmt: skip
    if what == "a finished checkpoint" and more == ("--restart",):  # which is asking for it
        call(*arguments, *more)
    else:
        assert cli.main([*map(str, arguments), *more]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
        if what == "a finished checkpoint" and more:  # test_resume.py knows more
            assert "expected the settings that its finished checkpoint was made with" in line
        else:
            assert "--out: expected a directory that is new or empty, found " in line
            assert str(out) in line and "--overwrite replaces the checkpoint there" in line
        call(*arguments, "--overwrite")
    assert json.loads((out / "gptq_report.json").read_text())["method"] == "rtn"
    assert load_pretrained(out) and (what != "a file" or (out / "notes.txt").exists())


@pytest.mark.parametrize("again", ["--resume", "--restart"])
def test_a_conversion_is_no_checkpoint_of_its_run(again, work, tmp_path, capsys):
    """It has the run's report, like all files that are not the model's."""
    convert(work / "gptq", tmp_path / "out", "compressed-tensors")
    assert (tmp_path / "out" / "gptq_report.json").exists()
    before = (tmp_path / "out" / "config.json").read_text()
    arguments = ["quantize", work / "model", "--out", tmp_path / "out", "--group-size", 32, again]
    assert cli.main([*map(str, arguments), "--device", "cpu"]) == 2
    assert "--out: expected a directory that is new or empty" in capsys.readouterr().err
    assert (tmp_path / "out" / "config.json").read_text() == before


def test_an_empty_directory_is_as_good_as_a_new_one(work, tmp_path):
    (tmp_path / "out").mkdir()
    call("quantize", work / "model", "--out", tmp_path / "out", "--group-size", 32,
         "--method", "rtn", "--device", "cpu")  # fmt: skip


def test_status_reaches_the_shell(work):
    finished = run("eval", work / "nowhere", "--text", work / "text.txt")
    assert finished.returncode == 2
    assert finished.stderr.splitlines()[-1].startswith("marlin: error: ")
    assert "Traceback" not in finished.stderr


def test_the_step_of_the_demo_that_quantizes(work, tmp_path):
    """On a model that takes seconds; the second time it knows the result."""
    settings = steps.Settings(str(work / "model"), tmp_path, "cpu", 32, 4, 64, eval_tokens=0)
    report, _ = steps.quantize(settings, "rtn")
    assert report["bytes"] > 0 and len(report["modules"]) == 21
    again, known = steps.quantize(settings, "rtn")
    assert known and again == report
