"""`quantize`: how long a model takes to quantize, and how much GPU memory.

A checkpoint of a real model's shapes and random weights is written to disk first (not timed), then
quantized as `python -m gptq quantize` does it: read layer by layer, calibrated with random tokens,
written as a Marlin checkpoint. Models of which only a few layers are run are extrapolated: seconds
of the median layer times those left out are added, and so marked.
"""

import json
import math
import re
import shutil
import statistics
import tempfile
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import save_file

from bench.machine import describe_run
from bench.report import number, table, write_result

PHASES = ("load", "forward", "factor", "solve", "loss", "write", "other")
GB = 1e9


@dataclass(frozen=True)
class Shape:
    """A Llama's sizes, and how much of it is measured by default."""

    hidden: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    measured: int  # layers
    memory: float = math.inf  # GB of GPU memory it has to do with


SHAPES = {
    "Llama-3-8B": Shape(4096, 14336, 32, 32, 8, 128256, measured=32),
    "Llama-3-70B": Shape(8192, 28672, 80, 64, 8, 128256, measured=4, memory=25),
    "SmolLM2-135M": Shape(576, 1536, 30, 9, 3, 49152, measured=30),
    "tiny": Shape(128, 256, 4, 4, 2, 256, measured=2),  # to try the bench itself
}
SAMPLES, LENGTH = 128, 2048


def write_model(folder: Path, shape: Shape, layers: int, device: str) -> None:
    """A checkpoint as transformers writes it, one file per layer."""
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_hidden_layers=layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocabulary,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        architectures=["LlamaForCausalLM"],
        dtype=torch.bfloat16,
    )
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    files: dict[str, dict[str, torch.Size]] = {}
    weight_map = {}
    for name, tensor in model.state_dict().items():
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        file = f"model-{int(layer[1]):05d}.safetensors" if layer else "model-rest.safetensors"
        files.setdefault(file, {})[name] = tensor.shape
        weight_map[name] = file
    generator = torch.Generator(device).manual_seed(0)
    for file, shapes in files.items():
        tensors = {name: _random(size, generator).cpu() for name, size in shapes.items()}
        save_file(tensors, folder / file, {"format": "pt"})
    index = {
        "metadata": {},
        "weight_map": {n: file for file, names in files.items() for n in names},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _random(size: torch.Size, generator: torch.Generator) -> torch.Tensor:
    if len(size) == 1:  # a norm
        return torch.ones(size, dtype=torch.bfloat16)
    options = {"device": generator.device, "dtype": torch.bfloat16, "generator": generator}
    return torch.randn(size, **options).mul_(0.02)


def measure(name: str, args, folder: Path) -> dict:
    """One model, from a checkpoint on disk to one with 4 bits."""
    from gptq import calibration, export, run
    from gptq.phases import Phases, phase
    from gptq.plan import make_plan
    from gptq.resume import Store

    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = SHAPES[name]
    layers = min(args.layers or (2 if args.quick else shape.measured), shape.layers)
    if layers < 2:
        raise SystemExit("bench quantize: --layers: expected at least 2, to time from one to next")
    count = args.tokens or (SAMPLES * LENGTH // (8 if args.quick else 1))
    length = min(LENGTH, count)
    generator = torch.Generator().manual_seed(0)
    samples = [
        torch.randint(shape.vocabulary, (1, length), generator=generator)
        for _ in range(count // length)
    ]
    started = time.perf_counter()
    write_model(folder / "model", shape, layers, device)
    print(f"{name}: {layers} of {shape.layers} layers written to disk in "
          f"{time.perf_counter() - started:.1f} s (not counted)", flush=True)  # fmt: skip
    memory = args.memory or shape.memory
    if device == "cuda":
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, memory * GB / total))
        torch.cuda.reset_peak_memory_stats()

    ends: dict[int, float] = {}  # layer -> when its last linear was done

    def note(result) -> None:
        ends[int(re.search(r"layers\.(\d+)", result.target.name)[1])] = time.perf_counter()
        if args.verbose:
            print(f"  {result.target.name} {result.seconds:.2f} s", flush=True)

    source = str(folder / "model")
    started = time.perf_counter()
    with Phases(device) as phases:
        with phase("load"):
            plan = make_plan(export.skeleton(source, export.load_config(source)), args.group_size)
            model = export.load_model(source)
        store = Store(folder / "out", plan, {"text": calibration.digest(samples)})
        modules = run.quantize(model, plan, samples, store, device=device, on_result=note)
        with phase("write"):
            export.save(model, None, folder / "out")
            store.remove()
    seconds = time.perf_counter() - started
    times = [ends[i] for i in sorted(ends)]
    per_layer = statistics.median(after - before for before, after in pairwise(times))
    peak = max((m["peak_bytes"] or 0) for m in modules)
    return {
        "model": name,
        "layers": shape.layers,
        "layers_measured": layers,
        "samples": len(samples),
        "tokens": sum(sample.numel() for sample in samples),
        "group_size": args.group_size,
        "seconds": seconds,
        "seconds_per_layer": per_layer,
        "seconds_whole_model": seconds + (shape.layers - layers) * per_layer,
        "phases": {key: phases.seconds[key] for key in PHASES},
        "memory_limit_gb": None if math.isinf(memory) else memory,
        "peak_bytes": peak,
        "reserved_bytes": torch.cuda.memory_reserved() if device == "cuda" else 0,
        "worse_than_rounding": [m["name"] for m in modules if not m["loss"] < m["rtn_loss"]],
        "notes": sorted({f"{m['method']}: {m['note']}" for m in modules if m["note"]}),
        "modules": modules,
    }


def run(args) -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name in args.models or ["Llama-3-8B", "Llama-3-70B"]:
        if name not in SHAPES:
            raise SystemExit(f"bench quantize: --models: expected {', '.join(SHAPES)}, got {name}")
    if args.dir is not None:
        args.dir.mkdir(parents=True, exist_ok=True)
    results = []
    for name in args.models or ["Llama-3-8B", "Llama-3-70B"]:
        folder = Path(tempfile.mkdtemp(prefix="bench-quantize-", dir=args.dir))
        try:
            results.append(measure(name, args, folder))
        finally:
            shutil.rmtree(folder)
        print_result(results[-1])
    whole = not (args.quick or args.layers or args.tokens or args.memory or args.models)
    file = "quantize" if whole else "quantize-chosen"
    result = {"bench": "quantize", "schema": 1, **describe_run(device), "models": results}
    print(f"written to {write_result(result, file, args.out)}")
    return 1 if any(r["worse_than_rounding"] for r in results) else 0


def print_result(result: dict) -> None:
    measured, layers = result["layers_measured"], result["layers"]
    print(f"\n{result['model']}, {measured} of {layers} layers, {result['tokens']} tokens, "
          f"group size {result['group_size']}")  # fmt: skip
    rows = [[key, number(value), number(value / measured, 3)]
            for key, value in result["phases"].items()]  # fmt: skip
    rows.append(["all", number(result["seconds"]), number(result["seconds"] / measured, 3)])
    print(table(["", "s", "s per layer"], rows, left=1))
    if measured < layers:
        print(f"whole model, extrapolated: {result['seconds_whole_model']:.0f} s "
              f"({result['seconds_per_layer']:.2f} s a layer)")  # fmt: skip
    if result["peak_bytes"]:
        limit = result["memory_limit_gb"]
        print(f"GPU memory: {result['peak_bytes'] / GB:.1f} GB at most"
              + (f", held to {limit:g} GB" if limit else ""))  # fmt: skip
    for note in result["notes"]:
        print(f"note: {note}")
    if worse := result["worse_than_rounding"]:
        print(f"WORSE THAN ROUNDING: {', '.join(worse)}")
