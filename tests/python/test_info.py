"""`marlin info`: the command, and what it says about GPUs that are not here."""

import json
import subprocess
import sys

import pytest
import torch

import marlin
from marlin import info, ops


def run_marlin(*arguments):
    command = [sys.executable, "-m", "marlin", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_info_for_people():
    run = run_marlin("info")
    assert run.returncode == 0, run.stderr
    for part in (marlin.__version__, torch.__version__, "portable", "threads"):
        assert part in run.stdout
    assert (ops.why_no_cuda() or "operators loaded") in run.stdout
    if not torch.cuda.is_available():
        assert "torch sees no CUDA device" in run.stdout


def test_info_for_machines():
    report = json.loads(run_marlin("info", "--json").stdout)
    assert report["version"] == marlin.__version__
    assert report["why_no_cuda"] == ops.why_no_cuda()
    assert "portable" in report["cpu"]["kernels"]
    assert len(report["gpus"]) == torch.cuda.device_count()
    assert (report["why_no_gpu"] is None) == torch.cuda.is_available()


@pytest.mark.gpu
def test_this_gpu_can_run():
    assert info.collect()["gpus"][0]["why_not"] is None


def test_no_subcommand_and_help():
    wrong = run_marlin()
    assert wrong.returncode == 2 and "COMMAND" in wrong.stderr
    assert "info" in run_marlin("--help").stdout


DEFAULT = "8.0;8.6;8.9;9.0a;8.0+PTX"


@pytest.mark.parametrize(
    "capability, archs, runs",
    [
        ((8, 0), DEFAULT, "machine code for 8.0"),
        ((8, 6), DEFAULT, "machine code for 8.6"),
        ((8, 7), DEFAULT, "machine code for 8.6"),  # Orin: later minor version
        ((9, 0), DEFAULT, "machine code for 9.0a"),
        ((10, 0), DEFAULT, "PTX for 8.0, compiled by the driver"),
        ((12, 0), DEFAULT, "PTX for 8.0, compiled by the driver"),
        ((7, 5), DEFAULT, None),
        ((8, 0), "8.6", None),
        ((9, 0), "8.0", None),
        ((9, 0), "9.0", "machine code for 9.0"),
        ((8, 9), "9.0a", None),
        ((9, 0), "", None),
    ],
)
def test_code_for_a_gpu(capability, archs, runs):
    assert info.code_for(capability, archs) == runs


@pytest.mark.parametrize(
    "capability, archs, engine",
    [((9, 0), DEFAULT, "sm_90 engine"), ((9, 0), "8.0+PTX", "sm_80 engine"),
     ((8, 9), DEFAULT, "sm_80 engine"), ((12, 0), DEFAULT, "sm_80 engine")],
)  # fmt: skip
def test_engine_of_a_gpu(capability, archs, engine):
    assert info.engine_for(capability, archs) == engine


def test_reasons():
    build = {"archs": "9.0a", "nvcc": "13.0"}
    assert "compute capability 8.0" in info.why_no_code((7, 5), build)
    assert "9.0a only" in info.why_no_code((8, 0), build)
    assert info.why_driver_too_old(13000, build) is None
    assert info.why_driver_too_old(13020, build) is None
    expected = "the driver knows CUDA up to 12.6, this build needs 13.0"
    assert info.why_driver_too_old(12060, build) == expected


def test_describe_names_each_gpu():
    report = info.collect()
    report["gpus"] = [
        {"name": "NVIDIA H200", "capability": "9.0", "runs": "machine code for 9.0a",
         "engine": "sm_90 engine", "why_not": None},
        {"name": "Tesla T4", "capability": "7.5", "runs": None, "engine": "sm_80 engine",
         "why_not": "it is too old"},
    ]  # fmt: skip
    text = info.describe(report)
    assert "NVIDIA H200 (9.0): runs the sm_90 engine, machine code for 9.0a" in text
    assert "Tesla T4 (7.5): cannot run: it is too old" in text
