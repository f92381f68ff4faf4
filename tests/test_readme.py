"""What the README tells people to type works."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import marlin
from bench import quality_readme
from marlin import cli
from marlin.convert import convert

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.fixture
def working_folder(tmp_path, monkeypatch):
    """Holds the checkpoint that the examples speak of, of a model that fits a test."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=64,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).half()
    marlin.quantize(model)
    marlin.save_pretrained(model, tmp_path / "llama-4bit")
    convert(tmp_path / "llama-4bit", tmp_path / "somebodys-gptq-model", "gptq")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_python_examples_run(number, working_folder):
    block, names = blocks("python")[number], {}
    if "peft" in block:
        pytest.importorskip("peft")
    exec(block, names)
    for name in ("y", "C"):
        if name in names:
            assert torch.isfinite(names[name]).all()


def test_there_are_examples():
    assert len(blocks("python")) == 6
    assert len(blocks("sh")) == 4


def test_marlin_commands_run(working_folder):
    """Those that need no more than the checkpoint that is there, and one that somebody made."""
    commands = re.findall(r"^marlin ((?:convert|info) .*)$", "\n".join(blocks("sh")), re.MULTILINE)
    assert len(commands) == 3
    for command in commands:
        assert cli.main(shlex.split(command, comments=True)) == 0
    assert marlin.load_pretrained("llama-for-vllm").config.model_type == "llama"


def test_commands_exist():
    commands = "\n".join(blocks("sh"))
    for target in re.findall(r"^make (\w+)", commands, re.MULTILINE):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for command in sorted(set(re.findall(r"^marlin (\w+)", commands, re.MULTILINE))):
        run = subprocess.run(
            [sys.executable, "-m", "marlin", command, "--help"],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stderr
        for line in commands.splitlines():
            if line.startswith(f"marlin {command} "):
                for option in re.findall(r"--[\w-]+", line):
                    assert option in run.stdout


def test_the_numbers_on_quality_are_those_of_the_committed_run():
    result = json.loads(quality_readme.RESULT.read_text())
    assert quality_readme.drawn(README, quality_readme.section(result)) == README
    for row in result["rows"]:
        row["domains"]["reference"]["delta"] = 0  # nothing that the README shows
    assert quality_readme.drawn(README, quality_readme.section(result)) == README
    default = next(row for row in result["rows"] if row["name"] == "default")
    default["domains"]["docstrings"]["nll"] += 0.002
    assert quality_readme.drawn(README, quality_readme.section(result)) != README


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "csrc/README.md"])
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert ((ROOT / page).parent / target).exists(), target


def test_the_map_names_every_room():
    rooms = {path.name for path in (ROOT / "csrc").iterdir() if path.is_dir()}
    text = (ROOT / "csrc" / "README.md").read_text()
    assert {room for room in rooms if f"`{room}/`" not in text} == set()
    for room, first in re.findall(r"^\| `(\w+)/` \| `([\w.]+)` \|", text, re.MULTILINE):
        assert (ROOT / "csrc" / room / first).exists(), f"{room}/{first}"
