"""Where a result comes from: machine, versions, commit, command."""

import os
import platform
import re
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


def run_quietly(*command: str) -> str | None:
    """The command's output without its last line end; None if it fails or is not there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=ROOT)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def commit() -> str:
    """`git describe`; MARLIN_COMMIT tells it where a copy without .git is measured."""
    described = run_quietly("git", "describe", "--always", "--dirty")
    return os.environ.get("MARLIN_COMMIT") or described or "unknown"


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    match = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return match[1].strip() if match else platform.processor() or platform.machine()


def slug(name: str) -> str:
    """The name of a folder or file: "NVIDIA H200" -> "nvidia-h200"."""
    name = re.sub(r"\((r|tm)\)", " ", name.lower())
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")


def describe_gpu() -> dict:
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    fields = "driver_version,power.limit,clocks.max.sm"
    asked = run_quietly("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits")
    answers = asked.splitlines()[0].split(", ") if asked else [None] * 3
    return {
        "name": properties.name,
        "sm_count": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
        **dict(zip(("driver", "power_limit_w", "max_sm_clock_mhz"), answers, strict=False)),
    }


def describe_cpu() -> dict:
    return {"name": cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}


def describe_run(device: str) -> dict:
    """The head of every result file; device is "cuda" or "cpu"."""
    return {
        "command": "python -m bench " + shlex.join(sys.argv[1:]),
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
        },
        "device": describe_gpu() if device == "cuda" else describe_cpu(),
    }
