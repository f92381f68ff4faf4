"""`python -m bench cpu` and `pack` really run, on shapes that take seconds."""

import json
import subprocess
import sys

import pytest
import torch

from bench import cpu, pack
from bench.machine import ROOT

pytest.importorskip("marlin.host")


def bench(*argv):
    command = [sys.executable, "-m", "bench", *map(str, argv)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def read_only(pattern, folder):
    (path,) = folder.glob(pattern)
    return json.loads(path.read_text())


def test_cpu_runs(tmp_path):
    text = bench("cpu", "--quick", "--shapes", "512x256", "--rows", "1,130", "--out", tmp_path)
    result = read_only("*/cpu-quick-chosen.json", tmp_path)
    assert set(result) == {"bench", "schema", "command", "commit", "date", "versions", "device",
                           "k", "n", "group_size", "kernels", "cells"}  # fmt: skip
    assert result["command"].startswith("python -m bench cpu --quick")
    assert [c["m"] for c in result["cells"]] == [1, 130]
    for c in result["cells"]:
        assert set(c["ms"]) == {*result["kernels"], cpu.FP32, cpu.DEQUANTIZE}
        assert c["speedup"]["portable"] == c["ms"][cpu.FP32] / c["ms"]["portable"]
        assert all(ms > 0 for ms in c["ms"].values())
    assert "portable ms" in text and "written to" in text


@pytest.mark.parametrize("wrong", [float("nan"), 1e3])
def test_cpu_times_nothing_that_is_wrong(monkeypatch, wrong):
    weights = cpu.Weights(256, 128, 128, 1000)
    right = cpu.ops.matmul
    monkeypatch.setattr(cpu.ops, "matmul", lambda *args, **kwargs: right(*args) + wrong)
    with pytest.raises(AssertionError, match=r"is (nan|[0-9.e+]+)$"):
        cpu.measure(weights, 2, ["portable"], 0.0)


def test_pack_runs(tmp_path):
    text = bench("pack", "--quick", "--shapes", "256x128", "--out", tmp_path)
    assert "dequantize" in text
    for path in tmp_path.glob("*/pack-quick-chosen.json"):  # one per device
        result = json.loads(path.read_text())
        assert {"pack", "unpack", "dequantize"} <= set(result["ms"])
        assert all(ms > 0 for ms in result["ms"].values())


def test_pack_checks_first():
    weight = pack.random_weight(256, 128, 128)
    pack.check(weight)
    weight.codes[0, 0] ^= 1
    with pytest.raises(AssertionError):
        pack.check(weight)


@pytest.mark.gpu
def test_pack_runs_on_the_gpu():
    ms = pack.measure_gpu(pack.random_weight(1024, 512, 128))
    assert set(ms) == {"pack", "unpack", "dequantize"} and all(v > 0 for v in ms.values())
    assert torch.cuda.is_available()
