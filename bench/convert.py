"""`convert`: seconds and memory of `marlin convert` for a checkpoint with a model's shapes.

A GPTQ checkpoint with random codes is written first, so its files are in the page cache: what is
measured is the work and the writing. Each conversion has a process of its own and starts when the
disk has nothing left to write of what came before, which would slow it down; one layer of each
result is compared with the source. Load is what else wanted the cores in the minute before.
"""

import json
import multiprocessing
import os
import re
import shutil
import tempfile
import threading
import time
from pathlib import Path

import torch

from bench.machine import describe_run
from bench.report import number, table, write_result
from marlin import ops
from marlin.convert import convert
from marlin.shard_writer import ShardWriter
from marlin.sources import open_source

HIDDEN, WIDE, HEAD_ROWS, GROUP_SIZE = 4096, 11008, 32000, 128  # Llama-2-7B
BLOCKS, QUICK_BLOCKS = 32, 2
LAYERS = {
    **{f"self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qkvo"},
    **{f"mlp.{name}_proj": (HIDDEN, WIDE) for name in ("gate", "up")},
    "mlp.down_proj": (WIDE, HIDDEN),
}
TARGETS = ("marlin", "gptq", "compressed-tensors")


def gptq_layer(k: int, n: int) -> dict[str, torch.Tensor]:
    groups = k // GROUP_SIZE
    return {
        "qweight": torch.randint(-(2**31), 2**31, (k // 8, n), dtype=torch.int32),
        "qzeros": torch.full((groups, n // 8), 0x77777777, dtype=torch.int32),
        "scales": torch.rand(groups, n).mul_(0.01).half(),
        "g_idx": torch.arange(k, dtype=torch.int32) // GROUP_SIZE,
    }


def write_source(directory: Path, blocks: int) -> None:
    """The blocks share random layers: what is in them does not matter to the speed."""
    directory.mkdir()
    quantization = {"quant_method": "gptq", "bits": 4, "group_size": GROUP_SIZE, "sym": True}
    config = {"architectures": ["LlamaForCausalLM"], "quantization_config": quantization}
    (directory / "config.json").write_text(json.dumps(config))
    layers = {name: gptq_layer(*shape) for name, shape in LAYERS.items()}
    with ShardWriter(directory, 2 * 10**9) as shards:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            shards.add(name, torch.randn(HEAD_ROWS, HIDDEN).half())
        for block in range(blocks):
            for name, parts in layers.items():
                for part, tensor in parts.items():
                    shards.add(f"model.layers.{block}.{name}.{part}", tensor.clone())
        shards.finish()


def peak_memory(stop: threading.Event, peaks: dict[str, int]) -> None:
    """Collects the largest of the process's own memory and of mapped files, in bytes."""
    done = False
    while not done:
        done = stop.wait(0.02)
        status = Path("/proc/self/status").read_text()
        for name, kilobytes in re.findall(r"(RssAnon|RssFile):\s*(\d+)", status):
            peaks[name] = max(peaks.get(name, 0), int(kilobytes) * 1024)


def measure(source: Path, target: Path, format: str, device: str, results) -> None:
    if device == "cuda":
        torch.zeros(1, device=device)  # CUDA's start is not what is asked
    os.sync()
    load = os.getloadavg()[0]
    stop, peaks = threading.Event(), {}
    watch = threading.Thread(target=peak_memory, args=(stop, peaks))
    watch.start()
    cpu = time.process_time()
    report = convert(source, target, format, device=device)
    cpu = time.process_time() - cpu
    stop.set()
    watch.join()
    results.put(
        {
            "seconds": report.seconds,
            "cpu_seconds": cpu,
            "load": load,
            "bytes_read": report.bytes_read,
            "bytes_written": report.bytes_written,
            "peak_own_bytes": peaks["RssAnon"],
            "peak_mapped_bytes": peaks["RssFile"],
        }
    )


def in_own_process(*arguments) -> dict:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=measure, args=(*arguments, results))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"bench convert: a conversion failed: {arguments[2:]}")
    return results.get()


def check(source: Path, target: Path) -> None:
    """Asserts that a layer of the result has the codes and scales of the source."""
    name = "model.layers.1.mlp.down_proj"
    with open_source(source) as before, open_source(target) as after:
        one, other = (each.read(name, each.parts(name)) for each in (before, after))
    assert torch.equal(one.codes, other.codes) and torch.equal(one.scales, other.scales)


def run(args) -> int:
    blocks = QUICK_BLOCKS if args.quick else BLOCKS
    has_gpu = torch.cuda.is_available() and ops.why_no_cuda() is None
    if args.dir is not None:
        args.dir.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="bench-convert-", dir=args.dir))
    try:
        source = folder / "source"
        write_source(source, blocks)
        for device in ("cpu", "cuda") if has_gpu else ("cpu",):
            measured = {}
            for target in TARGETS:
                measured[target] = in_own_process(source, folder / "target", target, device)
                check(source, folder / "target")
                shutil.rmtree(folder / "target")
            show(measured, device, blocks, args)
    finally:
        shutil.rmtree(folder)
    return 0


def show(measured: dict[str, dict], device: str, blocks: int, args) -> None:
    head = describe_run(device)
    result = {"bench": "convert", "schema": 1, **head, "blocks": blocks, "from_gptq_to": measured}
    rows = [
        [
            f"gptq -> {target}",
            number(values["bytes_read"] / 1e9),
            number(values["seconds"], 1),
            number(values["cpu_seconds"], 1),
            number(values["load"], 1),
            number(values["peak_own_bytes"] / 1e9),
            number(values["peak_mapped_bytes"] / 1e9),
        ]
        for target, values in measured.items()
    ]
    print(f"{head['device']['name']}, commit {head['commit']}; {blocks} blocks of Llama-2-7B")
    print(table(["", "GB", "s", "CPU s", "load", "own GB", "mapped GB"], rows, left=1))
    name = "convert" + ("-quick" if args.quick else "")
    print(f"written to {write_result(result, name, args.out)}\n")
