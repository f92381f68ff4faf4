"""`marlin info DIR`, `marlin convert`, and the commands that lie elsewhere."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import by_definition as by
import pytest
import torch

from bench import cli as bench_cli
from gptq import cli as gptq_cli
from marlin import cli

ROOT = Path(__file__).resolve().parents[2]
FORMATS = {
    "gptq": (by.gptq, by.gptq_config(sym=False), "14 of 14 layers"),
    "awq": (by.awq, by.awq_config(), "14 of 14 layers"),
    "compressed-tensors": (
        by.compressed_tensors,
        by.compressed_tensors_config(symmetric=False),
        "14 of 14 layers",
    ),
}


@pytest.fixture
def source(tmp_path):
    weights = by.llama_weights()
    return by.write_checkpoint(tmp_path / "source", by.gptq, weights, by.gptq_config())


def run(capsys, *argv):
    status = cli.main([str(argument) for argument in argv])
    return status, *capsys.readouterr()


@pytest.mark.parametrize("kind", FORMATS)
def test_info_of_a_checkpoint(kind, tmp_path, capsys):
    parts_of, config, zeros = FORMATS[kind]
    weights = by.llama_weights(zeros=(1, 15))
    directory = by.write_checkpoint(tmp_path / "a", parts_of, weights, config)
    status, out, _ = run(capsys, "info", directory)
    assert status == 0
    count = sum(weight.codes.size for weight in weights.values())
    for expected in (
        "LlamaForCausalLM", f"format      {kind}", "in 2 files", "14 linear layers",
        f"{count / 1e6:.1f} M weights", "groups of 32; scales F16", f"zero points {zeros}",
        "dense       7 tensors: F16",
    ):  # fmt: skip
        assert expected in out
    report = json.loads(run(capsys, "info", directory, "--json")[1])
    assert report["packed"]["weights"] == count
    assert report["packed"]["group_sizes"] == {"32": 14}
    data = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    assert 0 < data - report["bytes"] < 20_000  # headers
    assert report["bytes"] == report["packed"]["bytes"] + report["dense"]["bytes"]


def test_info_of_several_group_sizes(tmp_path, capsys):
    weights = by.llama_weights()
    weights["model.layers.0.mlp.down_proj"] = by.random_weight(96, 64, 1)
    config = by.gptq_config(dynamic={".*0.mlp.down_proj": {"group_size": -1}})
    directory = by.write_checkpoint(tmp_path / "a", by.gptq, weights, config)
    _, out, _ = run(capsys, "info", directory)
    assert "groups of 32 (13), one scale per column (1)" in out
    assert "none (symmetric)" in out


@pytest.mark.parametrize("quantization", [None, {}])
def test_info_of_full_precision(quantization, tmp_path, capsys):
    directory = by.write_checkpoint(tmp_path / "dense", by.gptq, {}, quantization)
    status, out, _ = run(capsys, "info", directory)
    assert status == 0 and "full precision" in out and "packed" not in out


@pytest.mark.parametrize("kind", [*FORMATS, "marlin"])
def test_info_of_packed_tensors_without_a_configuration(kind, tmp_path, capsys):
    parts_of = by.marlin if kind == "marlin" else FORMATS[kind][0]
    weights = {"model.layers.0.self_attn.q_proj": by.random_weight(64, 64, 2)}
    directory = by.write_checkpoint(tmp_path / "a", parts_of, weights, {})
    status, out, err = run(capsys, "info", directory)
    assert status == 2 and not out
    assert "holds packed tensors (model.layers.0.self_attn.q_proj." in err
    assert "but no quantization_config" in err


def test_info_of_what_is_no_checkpoint(source, tmp_path, capsys):
    for path in (tmp_path, tmp_path / "nothing", source / "config.json"):
        status, out, err = run(capsys, "info", path)
        assert status == 2 and not out
        assert err.startswith("marlin: error: ") and len(err.splitlines()) == 1


def test_info_of_a_checkpoint_with_the_older_key(tmp_path, capsys):
    parts_of, config, _ = FORMATS["compressed-tensors"]
    directory = by.write_checkpoint(
        tmp_path / "a", parts_of, by.llama_weights(zeros=(1, 15)), config
    )
    text = (directory / "config.json").read_text()
    (directory / "config.json").write_text(
        text.replace("quantization_config", "compression_config")
    )
    status, out, _ = run(capsys, "info", directory)
    assert status == 0 and "format      compressed-tensors" in out


def test_convert(source, tmp_path, capsys):
    status, out, _ = run(capsys, "convert", source, tmp_path / "out", "--format", "marlin")
    assert status == 0 and "14 layers from gptq to marlin" in out and "note: " not in out
    status, out, _ = run(capsys, "info", tmp_path / "out")
    assert "format      marlin" in out and "14 linear layers" in out
    status, _, err = run(capsys, "convert", source, tmp_path / "out", "--format", "gptq")
    assert status == 2 and f"marlin: error: target: {tmp_path / 'out'} is not empty" in err
    arguments = ("convert", source, tmp_path / "out", "--format", "gptq", "--overwrite")
    assert run(capsys, *arguments)[0] == 0
    assert "format      gptq" in run(capsys, "info", tmp_path / "out")[1]


def test_convert_notes_what_others_make_of_it(tmp_path, capsys):
    weights = by.llama_weights(zeros=(1, 15))
    source = by.write_checkpoint(tmp_path / "awq", by.awq, weights, by.awq_config())
    status, out, _ = run(capsys, "convert", source, tmp_path / "out", "--format", "gptq")
    assert status == 0 and "\nnote: it has zero points" in out


def test_convert_says_what_is_wrong(source, tmp_path, capsys):
    shutil.copytree(source, tmp_path / "damaged")
    shard = sorted((tmp_path / "damaged").glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-1])
    arguments = ("convert", tmp_path / "damaged", tmp_path / "out", "--format", "marlin")
    status, _, err = run(capsys, *arguments)
    assert status == 2 and shard.name in err.splitlines()[-1]
    assert not (tmp_path / "out").exists()
    config = by.gptq_config(dynamic={"+:(.+)+!": {}})  # seen when the progress bar is there
    bad = by.write_checkpoint(tmp_path / "bad", by.gptq, by.llama_weights(), config)
    status, _, err = run(capsys, "convert", bad, tmp_path / "out", "--format", "marlin")
    assert status == 2 and err.splitlines()[-1].startswith("marlin: error: quantization_config")
    if not torch.cuda.is_available():
        arguments = ("convert", source, tmp_path / "out", "--format", "marlin", "--device", "cuda")
        status, _, err = run(capsys, *arguments)
        assert status == 2 and "torch sees no CUDA device" in err
    for device in ("foo", "mps", "meta", "", "cuda:-1", "cuda:x"):
        arguments = ("convert", source, tmp_path / "out", "--format", "marlin", "--device", device)
        status, _, err = run(capsys, *arguments)
        assert status == 2 and f"expected cpu, cuda or cuda:N, got {device!r}" in err
        assert len(err.splitlines()) == 1
    sizes = [["--format", "gptq", "--shard-size", x] for x in ("0", "-1", "inf", "nan", "1e300")]
    for wrong in (["--format", "awq"], [], *sizes):
        with pytest.raises(SystemExit) as caught:
            run(capsys, "convert", source, tmp_path / "out", *wrong)
        assert caught.value.code == 2
    assert not (tmp_path / "out").exists()


def marlin(*arguments, cwd):
    command = [sys.executable, "-m", "marlin", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)


@pytest.mark.parametrize("command, expected", [("eval", "perplexity"), ("bench", "gemm")])
def test_commands_that_lie_elsewhere(command, expected, tmp_path):
    result = marlin(command, "--help", cwd=tmp_path)
    assert result.returncode == 0 and expected in result.stdout
    assert result.stdout.startswith(f"usage: marlin {command} ")


def trap(folder):
    """A checkpoint's folder as it may come: with Python files that `marlin` must not run."""
    for name in ("gptq/__init__.py", "bench/__init__.py", "tqdm.py", "runpy.py", "torch.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"open({str(folder / 'SPRUNG')!r}, 'w').close()\n")
    return folder


@pytest.mark.parametrize("command", ["eval", "bench"])
def test_the_current_directory_is_no_place_for_modules(command, tmp_path):
    folder = trap(tmp_path / "checkpoint")
    script = tmp_path / "bin" / "marlin"
    script.parent.mkdir()
    script.write_text("import sys\nfrom marlin.cli import main\nsys.exit(main())\n")  # as pip does
    result = subprocess.run(
        [sys.executable, script, command, "--help"], capture_output=True, text=True,
        cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert not (folder / "SPRUNG").exists()
    assert result.returncode == 0 and result.stdout.startswith(f"usage: marlin {command} ")


def test_nor_is_an_empty_part_of_the_path(monkeypatch, tmp_path):
    began = []
    monkeypatch.setattr(os, "execv", lambda program, argv: began.append((program, argv)))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["", str(tmp_path), ""]))
    cli.main(["eval", "a model", "--json"])
    ((program, argv),) = began
    assert program == argv[0] == sys.executable and argv[-3:] == ["eval", "a model", "--json"]
    assert os.environ["PYTHONPATH"] == os.pathsep.join([str(ROOT), str(tmp_path)])


@pytest.mark.parametrize("command", ["quantize", "eval"])
def test_without_transformers_a_line_says_what_to_install(command, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['transformers'] = None\n")
    result = subprocess.run(
        [sys.executable, "-m", "marlin", command, "--help"], capture_output=True, text=True,
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert (result.returncode, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("marlin: error: ") and 'pip install "marlin[gptq]"' in line


PROGRAMS = {
    "info": cli.main, "convert": cli.main, "quantize": gptq_cli.main, "eval": gptq_cli.main,
    "bench": lambda argv: bench_cli.main(argv[1:]),
}  # fmt: skip


@pytest.mark.parametrize("command", PROGRAMS)
def test_help_and_errors_speak_of_the_command_that_was_typed(command, capsys):
    with pytest.raises(SystemExit):
        PROGRAMS[command]([command, "--help"])
    text = capsys.readouterr().out
    assert text.startswith(f"usage: marlin {command} ") and "python -m" not in text
    assert f"example: marlin {command}" in text
    with pytest.raises(SystemExit) as caught:
        PROGRAMS[command]([command, "--no-such-option"])
    assert caught.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(("marlin: error: ", f"marlin {command}: error: "))


def test_help_names_every_command():
    text = cli.make_parser().format_help()
    for command in ("info", "convert", "quantize", "eval", "bench"):
        assert f"\n    {command} " in text


def test_a_command_that_is_not_installed(monkeypatch, capsys):
    monkeypatch.setitem(cli.ELSEWHERE, "bench", ("no_such_package", ""))
    status, _, err = run(capsys, "bench", "gemm")
    assert status == 2 and "it comes with the source tree" in err
