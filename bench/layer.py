"""`layer`: the linear layers of whole decoder blocks, chained, against cuBLAS FP16.

Distinct weights in real order, enough blocks that no cache holds them; each layer reads what an
earlier one wrote. Per model and batch size: q/k/v and gate/up fused, the same without
programmatic dependent launch, unfused as Hugging Face has them, and fused with norms, activation
and an attention stand-in between the layers. Beside them the sum of the same layers, each measured
alone as in `gemm`. FP16 runs the fused chain with both layouts of its weights, then the faster.
"""

import sys
import time
from dataclasses import dataclass

import torch

from bench import ceilings
from bench.blocks import BlockWeights, Chain, Step, block_steps
from bench.cell import AUTO, FP16_LAYOUTS, make_path, shared_graph_us, time_path
from bench.gemm import protocol
from bench.machine import describe_run
from bench.pools import Pools, check_dense
from bench.report import number, table, write_result
from marlin import ops
from marlin.testing.timing import (
    ROTATE_BYTES,
    Rates,
    Timing,
    capture,
    floor_us,
    known_rates,
    launch_count,
    replay_count,
    time_graph,
)

MODELS = ("Llama-2-7B", "Llama-3-8B", "Llama-3-70B")
ROWS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)
QUICK_ROWS = (1, 16, 64, 256)


@dataclass(frozen=True)
class Variant:
    """What a chain is like: q/k/v and gate/up fused, other kernels between the layers, launches
    that may overlap (FP16 has no such choice)."""

    fused: bool = True
    neighbours: bool = False
    chained: bool = True


FUSED, UNCHAINED, ALONE = "fused", "unchained", "alone"
VARIANTS = {
    FUSED: Variant(),
    UNCHAINED: Variant(chained=False),
    "unfused": Variant(fused=False),
    "real": Variant(neighbours=True),
}


def block_floor_us(rates: Rates, steps: list[Step], m: int, group_size: int, bits: int = 4):
    """us of a block: the floors of its layers added."""
    return sum(floor_us(rates, m, step.k, step.n, group_size, bits) for step in steps)


def time_chain(chain: Chain, floor: float, check) -> Timing:
    """us per block, after checking every layer's output; ``check`` None: not again."""
    blocks = len(chain.weights)
    launches = launch_count(blocks, floor)
    rounds = launches // blocks

    def launch_all():
        for _ in range(rounds):
            chain.launch()

    graph = capture(launch_all, chain.launch)
    if check is not None:
        chain.poison()
        graph.replay()
        for launch in chain.launched:
            check(launch)
    return time_graph(graph, launches, replay_count(launches * floor))


class ModelMeasurement:
    """All timings of one model's blocks: us by (m, variant) and path."""

    def __init__(self, model: str, rows, group_size: int, dtype, rates: Rates, configs: list[str],
                 device="cuda", rotate_bytes=ROTATE_BYTES):  # fmt: skip
        self.model, self.rows, self.group_size, self.rates = model, rows, group_size, rates
        self.configs = configs
        self.steps = {fused: block_steps(model, fused) for fused in (True, False)}
        self.weights = BlockWeights(model, group_size, dtype, device, rotate_bytes)
        self.timings: dict[tuple[int, str], dict[str, list[float]]] = {}
        self.failures: dict[tuple[int, str, str], str] = {}

    def add(self, m: int, variant: str, path: str, us: float) -> None:
        self.timings.setdefault((m, variant), {}).setdefault(path, []).append(us)

    def measure_chains(self) -> None:
        """Both passes over every variant and batch size; the second in reversed order."""
        for name, variant in VARIANTS.items():
            steps = self.steps[variant.fused]
            packed = self.weights.packed(steps)
            for config in self.configs:
                chosen = operator_config(config, variant.chained)

                def multiply(x, weight, y, config=chosen):
                    ops.matmul_out(x, weight.b, weight.s, y, config=config)

                def check(launch):
                    launch.weight.check(launch.y, launch.x)

                self._both_passes(name, config, 4, packed, multiply, check, self.rows)
            del packed
            if not variant.chained:
                continue  # FP16 ran with FUSED
            for path, transposed in FP16_LAYOUTS.items():
                rows = [m for m in self.rows if name == FUSED or path == self._layout(m)]
                dense = self.weights.dense(steps, transposed) if rows else []

                def multiply(x, weight, y):
                    torch.mm(x, weight, out=y)

                def check(launch):
                    check_dense(launch.y, launch.x, launch.weight)

                self._both_passes(name, path, 16, dense, multiply, check, rows)
                del dense

    def _layout(self, m: int) -> str:
        """In which FP16 ran the fused chain faster."""
        found = self.timings.get((m, FUSED), {})
        return min(FP16_LAYOUTS, key=lambda path: sum(found.get(path, [float("inf")])))

    def _both_passes(self, variant, path, bits, weights, multiply, check, all_rows) -> None:
        steps, neighbours = self.steps[VARIANTS[variant].fused], VARIANTS[variant].neighbours
        for rows, first in ((all_rows, True), (all_rows[::-1], False)):
            for m in rows:
                if (m, variant, path) in self.failures:
                    continue
                chain = Chain(
                    steps, weights, self.weights.rows(m, steps[0].k), multiply, neighbours
                )
                floor = block_floor_us(self.rates, steps, m, self.group_size, bits)
                try:
                    timing = time_chain(chain, floor, check if first else None)
                except (AssertionError, RuntimeError) as error:
                    self._fail(m, variant, path, error)
                    continue
                self.add(m, variant, path, timing.median_us)

    def measure_alone(self) -> None:
        """Every distinct layer by itself, as `gemm` measures it; added up over the fused block."""
        shapes = sorted({(s.k, s.n) for s in self.steps[True]})
        counts = {shape: sum((s.k, s.n) == shape for s in self.steps[True]) for shape in shapes}
        cells = [(k, n, m) for m in self.rows for k, n in shapes]
        pools = Pools(cells, self.group_size, self.weights.dtype, self.weights.device,
                      rotate_bytes=self.weights.rotate_bytes)  # fmt: skip
        for rows, first in ((self.rows, True), (self.rows[::-1], False)):
            for m in rows:
                names = (*self.configs, self._layout(m))
                for path in names:
                    if (m, ALONE, path) in self.failures:
                        continue
                    try:
                        us = sum(
                            count * self._time_alone(pools, path, names, (*shape, m), first)
                            for shape, count in counts.items()
                        )
                    except (AssertionError, RuntimeError) as error:
                        self._fail(m, ALONE, path, error)
                        continue
                    self.add(m, ALONE, path, us)

    def _time_alone(self, pools: Pools, name: str, names, cell, check: bool) -> float:
        """us of one layer (k, n, m), by one of the `names` that are compared."""
        paths = {each: make_path(each, pools, self.rates, *cell) for each in names}
        graph_us = shared_graph_us(paths.values())
        return time_path(pools, paths[name], *cell, check, graph_us).median_us

    def _fail(self, m: int, variant: str, path: str, error: Exception) -> None:
        if isinstance(error, torch.cuda.OutOfMemoryError):
            raise error
        kind = "WRONG" if isinstance(error, AssertionError) else "refused"
        self.failures[m, variant, path] = f"{kind}: {str(error).splitlines()[0]}"
        print(f"{self.model} m={m} {variant} {path}: {error}", file=sys.stderr)
        torch.cuda.synchronize()

    def records(self) -> list[dict]:
        """One per batch size, variant and configuration."""
        found = []
        means = {
            key: {path: sum(us) / len(us) for path, us in paths.items()}
            for key, paths in self.timings.items()
        }
        for (m, variant), paths in self.timings.items():
            baseline = means.get((m, FUSED if variant == UNCHAINED else variant), {})
            fp16 = min((us for path, us in baseline.items() if path in FP16_LAYOUTS), default=None)
            fused = VARIANTS.get(variant, VARIANTS[FUSED]).fused
            floor = block_floor_us(self.rates, self.steps[fused], m, self.group_size)
            for config in self.configs:
                us = means[m, variant].get(config)
                if us is None:
                    continue
                others = {name: means.get((m, name), {}).get(config) for name in (UNCHAINED, ALONE)}
                found.append({
                    "model": self.model, "m": m, "variant": variant, "config": config,
                    "us": us, "us_passes": paths[config], "fp16_us": fp16,
                    "speedup": fp16 and fp16 / us, "floor_us": floor,
                    "percent_of_floor": 100 * floor / us,
                    "vs_unchained": others[UNCHAINED] and others[UNCHAINED] / us,
                    "vs_alone": others[ALONE] and others[ALONE] / us,
                })  # fmt: skip
        return found


def operator_config(config: str, chained: bool) -> str | None:
    """The name by which the operator runs a configuration so."""
    name = None if config == AUTO else config
    if chained:
        return name
    return f"unchained:{name}" if name else "unchained"


def format_result(result: dict) -> str:
    """A table per model and configuration: us, speed-up and percent of floor of each variant."""
    lines = [
        f"{result['device']['name']}, commit {result['commit']}, group {result['group_size']}, "
        f"{result['dtype']}: us per block, x FP16, % of floor (the layers' floors added)",
        f"{ALONE}: fused layers measured one by one and added; real: with norms, activation and "
        "an attention stand-in between the layers, whose time both sides carry; "
        f"{UNCHAINED}: fused, without programmatic dependent launch",
    ]
    variants = (ALONE, *VARIANTS)
    header = ["m", *(h for v in variants for h in (v, "xFP16", "%")), "fused: xunchained", "xalone"]
    cells = result["blocks"]
    for model, config in dict.fromkeys((c["model"], c["config"]) for c in cells):
        chosen = {(c["m"], c["variant"]): c for c in cells
                  if (c["model"], c["config"]) == (model, config)}  # fmt: skip
        rows = []
        for m in sorted({m for m, _ in chosen}):
            found = [chosen.get((m, variant)) for variant in variants]
            parts = [
                (number(c["us"], 1), number(c["speedup"]), number(c["percent_of_floor"], 0))
                if c
                else ("-", "-", "-")
                for c in found
            ]
            ratios = [
                number(chosen[m, FUSED][key]) if (m, FUSED) in chosen else "-"
                for key in ("vs_unchained", "vs_alone")
            ]
            rows.append([m, *(text for part in parts for text in part), *ratios])
        lines += ["", f"{model}, {config}", table(header, rows)]
    lines += ["FAILED {model} m={m} {variant} {config}: {error}".format(**f)
              for f in result["failures"]]  # fmt: skip
    return "\n".join(lines)


def run(args) -> int:
    if not torch.cuda.is_available():
        print("bench layer: expected a CUDA device, torch sees none", file=sys.stderr)
        return 2
    started = time.perf_counter()
    head = describe_run("cuda")
    dtype = getattr(torch, args.dtype)
    rows = args.rows or (QUICK_ROWS if args.quick else ROWS)
    models = args.models or (MODELS[:1] if args.quick else MODELS)
    measured = ceilings.measure(dtype)
    rates = known_rates(head["device"]["name"]) or ceilings.rates_from(measured)
    result = {"bench": "layer", "schema": 1, **head, "group_size": args.group_size,
              "dtype": args.dtype, "protocol": protocol(passes=2), "rates": vars(rates),
              "measured": measured, "blocks": [], "failures": []}  # fmt: skip
    name = "layer" + "".join(
        part
        for part, wanted in (
            (f"-g{args.group_size}", args.group_size != 128),
            (f"-{args.dtype}", args.dtype != "float16"),
            ("-" + "-".join(args.config), args.config != [AUTO]),
            ("-quick", args.quick),
            ("-chosen", args.rows or args.models),
        )
        if wanted
    )
    with torch.inference_mode():
        for model in models:
            torch.cuda.empty_cache()
            measurement = ModelMeasurement(
                model, list(rows), args.group_size, dtype, rates, args.config
            )
            measurement.measure_chains()
            measurement.measure_alone()
            result["blocks"] += measurement.records()
            result["failures"] += [
                {"model": model, "m": m, "variant": variant, "config": path, "error": error}
                for (m, variant, path), error in measurement.failures.items()
            ]
            result["seconds"] = round(time.perf_counter() - started, 1)
            path = write_result(result, name, args.out)
    print(format_result(result))
    print(f"\n{result['seconds']:.0f} s, written to {path}")
    return 1 if result["failures"] or not result["blocks"] else 0
