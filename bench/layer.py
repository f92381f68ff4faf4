"""`layer`: the linear layers of whole decoder blocks, chained, against cuBLAS FP16.

Distinct weights in real order, enough blocks that no cache holds them; each layer reads what an
earlier one wrote. Per model and batch size: q/k/v and gate/up fused, the same unfused as Hugging
Face has them, and fused with norms, activation and an attention stand-in between the layers.
Beside them the sum of the same layers, each measured alone as in `gemm`.
"""

import sys

import torch

from bench import ceilings
from bench.blocks import Chain, Step, block_steps
from bench.cell import AUTO, FP16_LAYOUTS, make_path, time_path
from bench.gemm import PROTOCOL
from bench.machine import describe_run
from bench.pools import PackedWeight, Pools, check_dense
from bench.report import number, table, write_result
from marlin import ops
from marlin.testing.timing import (
    ROTATE_BYTES,
    Rates,
    Timing,
    capture,
    floor_us,
    group_count,
    known_rates,
    launch_count,
    packed_bytes,
    rotation_count,
    time_graph,
)

MODELS = ("Llama-2-7B", "Llama-3-8B", "Llama-3-70B")
ROWS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)
QUICK_ROWS = (1, 16, 64, 256)
VARIANTS = {"fused": (True, False), "unfused": (False, False), "real": (True, True)}
# name -> (q/k/v and gate/up fused, with neighbours between the layers)
ALONE, FP16 = "alone", "fp16"


def block_floor_us(rates: Rates, steps: list[Step], m: int, group_size: int, bits: int = 4):
    """us of a block: the floors of its layers added."""
    return sum(floor_us(rates, m, step.k, step.n, group_size, bits) for step in steps)


class BlockWeights:
    """Random weights for several blocks of a model, sized so that activations keep their size."""

    def __init__(
        self, model: str, group_size: int, dtype, device="cuda", rotate_bytes=ROTATE_BYTES
    ):
        generator = torch.Generator(device).manual_seed(2)
        self.group_size, self.dtype, self.device = group_size, dtype, device
        self.generator, self.rotate_bytes = generator, rotate_bytes
        block_bytes = sum(packed_bytes(s.k, s.n) for s in block_steps(model, True))
        self.blocks = rotation_count(block_bytes, rotate_bytes)

    def packed(self, steps: list[Step]) -> list[list[PackedWeight]]:
        return [[self._packed(s.k, s.n) for s in steps] for _ in range(self.blocks)]

    def dense(self, steps: list[Step], transposed: bool) -> list[list[torch.Tensor]]:
        return [[self._dense(s.k, s.n, transposed) for s in steps] for _ in range(self.blocks)]

    def _packed(self, k: int, n: int) -> PackedWeight:
        b = torch.empty(k // 16, 2 * n, dtype=torch.int32, device=self.device)
        b.random_(-(2**31), 2**31, generator=self.generator)
        # The squares of codes - 8 are 21.5 in the mean, those of uniform 0.5 … 1.5 are 13/12.
        scale = (21.5 * 13 / 12 * k) ** -0.5
        s = torch.empty(group_count(k, self.group_size), n, device=self.device)
        s.uniform_(0.5 * scale, 1.5 * scale, generator=self.generator)
        # The codes' mean is -0.5. With scales of one sign every layer would amplify the mean of its
        # input by sqrt(k) / 10, and a few layers on nothing would be finite.
        s *= torch.empty_like(s).uniform_(-1, 1, generator=self.generator).sign()
        return PackedWeight(b, s.to(self.dtype))

    def _dense(self, k: int, n: int, transposed: bool) -> torch.Tensor:
        shape = (n, k) if transposed else (k, n)
        w = torch.empty(shape, dtype=self.dtype, device=self.device)
        w.normal_(0, k**-0.5, generator=self.generator)
        return w.t() if transposed else w

    def rows(self, m: int, hidden: int) -> torch.Tensor:
        x = torch.empty(m, hidden, dtype=self.dtype, device=self.device)
        return x.normal_(generator=self.generator)


def time_chain(chain: Chain, floor: float, check) -> Timing:
    """us per block, after checking every layer's output; ``check`` None: not again."""
    blocks = len(chain.weights)
    rounds = launch_count(blocks, floor) // blocks

    def launch_all():
        for _ in range(rounds):
            chain.launch()

    graph = capture(launch_all, chain.launch)
    if check is not None:
        chain.poison()
        graph.replay()
        for launch in chain.launched:
            check(launch)
    return time_graph(graph, rounds * blocks)


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
        for variant, (fused, neighbours) in VARIANTS.items():
            steps = self.steps[fused]
            packed = self.weights.packed(steps)
            for config in self.configs:
                chosen = None if config == AUTO else config

                def multiply(x, weight, y, config=chosen):
                    ops.matmul_out(x, weight.b, weight.s, y, config=config)

                def check(launch):
                    launch.weight.check(launch.y, launch.x)

                self._both_passes(variant, config, 4, packed, multiply, check, neighbours)
            del packed
            for path, transposed in FP16_LAYOUTS.items():
                dense = self.weights.dense(steps, transposed)

                def multiply(x, weight, y):
                    torch.mm(x, weight, out=y)

                def check(launch):
                    check_dense(launch.y, launch.x, launch.weight)

                self._both_passes(variant, path, 16, dense, multiply, check, neighbours)
                del dense

    def _both_passes(self, variant, path, bits, weights, multiply, check, neighbours) -> None:
        steps = self.steps[VARIANTS[variant][0]]
        for rows, first in ((self.rows, True), (self.rows[::-1], False)):
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
                for path in (*self.configs, FP16):
                    if (m, ALONE, path) in self.failures:
                        continue
                    try:
                        us = sum(
                            count * self._time_alone(pools, path, k, n, m, first)
                            for (k, n), count in counts.items()
                        )
                    except (AssertionError, RuntimeError) as error:
                        self._fail(m, ALONE, path, error)
                        continue
                    self.add(m, ALONE, path, us)

    def _time_alone(self, pools: Pools, name: str, k: int, n: int, m: int, check: bool) -> float:
        """us of one layer; for FP16 the better of both layouts."""
        names = FP16_LAYOUTS if name == FP16 else [name]
        paths = [make_path(each, pools, self.rates, k, n, m) for each in names]
        return min(time_path(pools, path, k, n, m, check).median_us for path in paths)

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
        for (m, variant), paths in self.timings.items():
            means = {path: sum(us) / len(us) for path, us in paths.items()}
            fp16 = min((us for p, us in means.items() if p not in self.configs), default=None)
            fused = VARIANTS.get(variant, (True, False))[0]
            floor = block_floor_us(self.rates, self.steps[fused], m, self.group_size)
            for config in self.configs:
                if config not in means:
                    continue
                us = means[config]
                found.append({
                    "model": self.model, "m": m, "variant": variant, "config": config,
                    "us": us, "us_passes": paths[config], "fp16_us": fp16,
                    "speedup": fp16 and fp16 / us, "floor_us": floor,
                    "percent_of_floor": 100 * floor / us,
                })  # fmt: skip
        return found


def format_result(result: dict) -> str:
    """A table per model and configuration: us, speed-up and percent of floor of each variant."""
    lines = [
        f"{result['device']['name']}, commit {result['commit']}, group {result['group_size']}, "
        f"{result['dtype']}: us per block, x FP16, % of floor (the layers' floors added)",
        f"{ALONE}: fused layers measured one by one and added; real: with norms, activation and "
        "an attention stand-in between the layers, whose time both sides carry",
    ]
    variants = (ALONE, *VARIANTS)
    header = ["m", *(h for v in variants for h in (v, "xFP16", "%"))]
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
            rows.append([m, *(text for part in parts for text in part)])
        lines += ["", f"{model}, {config}", table(header, rows)]
    lines += ["FAILED {model} m={m} {variant} {config}: {error}".format(**f)
              for f in result["failures"]]  # fmt: skip
    return "\n".join(lines)


def run(args) -> int:
    if not torch.cuda.is_available():
        print("bench layer: expected a CUDA device, torch sees none", file=sys.stderr)
        return 2
    head = describe_run("cuda")
    dtype = getattr(torch, args.dtype)
    rows = args.rows or (QUICK_ROWS if args.quick else ROWS)
    models = args.models or (MODELS[:1] if args.quick else MODELS)
    measured = ceilings.measure(dtype)
    rates = known_rates(head["device"]["name"]) or ceilings.rates_from(measured)
    result = {"bench": "layer", "schema": 1, **head, "group_size": args.group_size,
              "dtype": args.dtype, "protocol": PROTOCOL, "rates": vars(rates),
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
            path = write_result(result, name, args.out)
    print(format_result(result))
    print(f"\nwritten to {path}")
    return 1 if result["failures"] or not result["blocks"] else 0
