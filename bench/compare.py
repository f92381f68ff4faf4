"""Reads gemm records against the incumbents: ratios per cell, sums over a model's layers."""

from bench.incumbents import Incumbents
from marlin.testing.shapes import MODELS

LARGE_SHAPE = (16384, 16896)  # big enough for every kernel to be at its best
SUMMED_MODELS = ("Llama-3-70B", "Llama-2-7B", "Llama-3-8B")
MATCH_PUBLISHED = 0.97  # ratios below these are reported by name
MATCH_BEST = 0.98


def fused_layers(model: str) -> dict[str, tuple[int, int]]:
    """name -> (k, n) of a block whose q, k, v and gate, up are one layer each."""
    layers = MODELS[model]
    hidden = layers["q"][0]
    return {
        "qkv": (hidden, sum(layers[name][1] for name in ("q", "k", "v"))),
        "o": layers["o"],
        "gate_up": (hidden, layers["gate"][1] + layers["up"][1]),
        "down": layers["down"],
    }


def add_comparison(records: list[dict], incumbents: Incumbents, group_size: int) -> None:
    """Adds the incumbents' us and how many times faster ours is, where there is a match."""
    for record in records:
        cell = record["k"], record["n"], record["m"]
        published = incumbents.published_us(cell, group_size)
        best_name, best_us = incumbents.best(cell, group_size) or (None, None)
        record["published_us"] = published
        record["vs_published"] = published and published / record["us"]
        record["best_incumbent"] = best_name
        record["best_incumbent_us"] = best_us
        record["vs_best"] = best_us and best_us / record["us"]


def add_up(
    records: list[dict], shapes: list[tuple[int, int]], m: int, incumbents: Incumbents, group_size
) -> dict | None:
    """The sums over these shapes at m rows, each measured by itself; None if one is missing."""
    by_shape = {(r["k"], r["n"]): r for r in records if r["m"] == m}
    if not all(shape in by_shape for shape in shapes):
        return None
    chosen = [by_shape[shape] for shape in shapes]
    us, floor = sum(r["us"] for r in chosen), sum(r["floor_us"] for r in chosen)
    fp16 = None if None in [r["fp16_us"] for r in chosen] else sum(r["fp16_us"] for r in chosen)
    net = [r["net_us"] for r in chosen]
    net_us = None if None in net else sum(net)
    cells = [(k, n, m) for k, n in shapes]
    best_name, best_us = incumbents.best_sum(cells, group_size) or (None, None)
    published = [incumbents.published_us(cell, group_size) for cell in cells]
    published_us = None if None in published else sum(published)
    their_fp16 = incumbents.fp16_sum(cells)
    return {
        "m": m, "us": us, "fp16_us": fp16, "speedup": fp16 and fp16 / us,
        "percent_of_floor": 100 * floor / us, "net_speedup": fp16 and net_us and fp16 / net_us,
        "ideal_speedup": sum(r["ideal_speedup"] * r["floor_us"] for r in chosen) / floor,
        "published_speedup": published_us and their_fp16 and their_fp16 / published_us,
        "best_incumbent": best_name, "best_incumbent_us": best_us,
        "best_incumbent_speedup": best_us and their_fp16 and their_fp16 / best_us,
        "vs_best": best_us and best_us / us,
    }  # fmt: skip


def model_sums(
    records: list[dict], incumbents: Incumbents, group_size: int
) -> dict[str, list[dict]]:
    """Columns of the summary: the large shape and every model whose layers were measured."""
    columns = {f"k={LARGE_SHAPE[0]} n={LARGE_SHAPE[1]}": [LARGE_SHAPE]}
    columns |= {model: list(fused_layers(model).values()) for model in SUMMED_MODELS}
    rows = sorted({r["m"] for r in records})
    sums = {
        name: [s for m in rows if (s := add_up(records, shapes, m, incumbents, group_size))]
        for name, shapes in columns.items()
    }
    return {name: values for name, values in sums.items() if values}


def beaten(records: list[dict], key: str, bound: float) -> list[dict]:
    """The records whose ratio `key` is below the bound, worst first."""
    return sorted(
        (r for r in records if r[key] is not None and r[key] < bound), key=lambda r: r[key]
    )
