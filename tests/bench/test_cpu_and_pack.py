"""`python -m bench cpu` and `pack` really run, on shapes that take seconds."""

import json
import subprocess
import sys

import pytest
import torch

from bench import cpu, pack
from bench.machine import ROOT
from marlin.testing.timing import Timing

host = pytest.importorskip("marlin.host")


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


def one_wrong(function):
    """The function, with the last element of its result changed."""

    def wrong(*args):
        result = function(*args)
        result[-1, -1] += 1
        return result

    return wrong


@pytest.mark.parametrize("module", [pack.ops, host])
@pytest.mark.parametrize("function", ["pack", "unpack", "dequantize"])
def test_pack_times_nothing_that_is_wrong(monkeypatch, module, function):
    weight = pack.random_weight(256, 128, 128)
    monkeypatch.setattr(pack, "time_interleaved", lambda paths, rounds: {n: [1.0] for n in paths})
    names = {"pack", "unpack", "dequantize"}
    names |= {"pack (NumPy)", "unpack (NumPy)", "dequantize (NumPy, to float32)"}
    assert pack.measure_cpu(weight, 1) == dict.fromkeys(names, 1000.0)
    monkeypatch.setattr(module, function, one_wrong(getattr(module, function)))
    with pytest.raises(AssertionError, match=rf"^{function}\b.*: 1 of \d+ elements are wrong$"):
        pack.measure_cpu(weight, 1)


def test_pack_checks_the_type():
    with pytest.raises(AssertionError, match=r"expected torch.float16 \(2,\), got torch.float32"):
        pack.check("dequantize", torch.zeros(2), torch.zeros(2, dtype=torch.half))


@pytest.mark.parametrize("function", ["pack", "unpack", "dequantize"])
@pytest.mark.parametrize("fault", [None, "writes nothing", "one wrong"])
def test_pack_checks_what_the_graph_writes(monkeypatch, function, fault):
    """The CPU stands in for the GPU: a replay writes where the recorded launches wrote."""
    path = pack.operators([pack.random_weight(256, 128, 128)] * 2)[function]
    if fault == "one wrong":
        path = pack.Path(one_wrong(path.call), path.expected)
    outputs = []

    def record(i):
        outputs.append(path.call(i))
        return outputs[-1]

    class FakeGraph:
        def replay(self):
            if fault != "writes nothing":
                outputs[-1].copy_(path.call(0))

    def capture(launches, warm_up):
        launches()
        return FakeGraph()

    monkeypatch.setattr(pack, "capture", capture)
    monkeypatch.setattr(pack, "time_graph", lambda graph, count: Timing([7000.0]))
    recorded = pack.Path(record, path.expected)
    if fault is None:
        assert pack.time_in_graph(function, recorded, 2) == 7.0
        assert len(outputs) == 2
        return
    with pytest.raises(AssertionError, match=rf"^{function}: \d+ of \d+ elements are wrong$"):
        pack.time_in_graph(function, recorded, 2)


@pytest.mark.gpu
def test_pack_runs_on_the_gpu():
    ms = pack.measure_gpu(pack.random_weight(1024, 512, 128))
    assert set(ms) == {"pack", "unpack", "dequantize"} and all(v > 0 for v in ms.values())
    assert torch.cuda.is_available()
