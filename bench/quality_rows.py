"""Which quantizations `quality` compares, most telling first, so that a part of them is useful."""

from dataclasses import dataclass

from gptq.solver import PUBLISHED

FULL, RTN, GPTQ = "full", "rtn", "gptq"
PLAIN_CLIP = {**PUBLISHED, "clip": True, "metric": "block"}
# What second moments are multiplied in. The models here are in FP32, and so is this where no row
# says otherwise; a model in 16 bits has its own type, exactly. That layers which read one input
# share their second moments changes no number, so there is no row for it.
PRODUCTS = {
    "FP16 products": {"products": "float16"},
    "BF16 products": {"products": "bfloat16"},
    "FP64 products": {"products": "float64"},
}
# Each addition to the published algorithm alone …
ALONE = {
    "clip by conditional H": {"clip": True, "metric": "conditional"},
    "clip by its diagonal": {"clip": True, "metric": "diagonal"},
    "clip by trial": {"clip": True, "metric": "trial"},
    "full range": {"full_range": True, "metric": "trial"},
    "order": {"order": True},
    "refit": {"refit": True},
    "sweeps": {"sweeps": 3},
}
# … and on top of one another, ``plain clip`` being the first; with the last one it is the default.
TOGETHER = {
    "+ full range": {"full_range": True},
    "+ order": {"order": True},
    "+ refit": {"refit": True},
}
# The default with one choice made otherwise.
INSTEAD = {
    "metric trial": {"metric": "trial"},
    "one sweep": {"sweeps": 1},
    "default, BF16 products": {"products": "bfloat16"},
}
# And what is no switch of the solver, but a choice all the same, of the default or as published.
GLUED = "documents glued together"
ROUNDED_LAST = "scales rounded last"
TOKENS = 24_576
GROWTH = (12_288, 49_152, None)  # None: all there are
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Row:
    """One quantization to measure."""

    name: str
    method: str
    group_size: int = 64
    options: tuple = ()  # (name, value) pairs for solver.rtn or walk.quantize_gptq
    seed: int = 0
    tokens: int | None = TOKENS  # of calibration, for GPTQ (an encoder counts sentences instead)
    glued: bool = False  # calibration text in windows of one length, across documents
    rounded_last: bool = False  # the loop has scales in FP32, only the checkpoint in FP16

    def settings(self) -> tuple:
        """What rows that may be compared with each other have in common."""
        return self.group_size, self.seed, self.tokens


def rtn_rows(group: int, tokens: int | None) -> list[Row]:
    kinds = {"RTN": {}, "RTN full range": {"full_range": True}, "RTN clipped": {"clip": True}}
    return [Row(n, RTN, group, tuple(o.items()), 0, tokens) for n, o in kinds.items()]


def gptq_rows(names: dict[str, dict], group: int, seed: int, tokens: int | None) -> list[Row]:
    return [
        Row(name, GPTQ, group, tuple(options.items()), seed, tokens)
        for name, options in names.items()
    ]


def otherwise_rows(
    group: int, seed: int, tokens: int | None, name: str = "default", options: dict | None = None
) -> list[Row]:
    """name, options: of what these choices are made otherwise in."""
    pairs = tuple((options or {}).items())
    return [
        Row(f"{name}, {GLUED}", GPTQ, group, pairs, seed, tokens, glued=True),
        Row(f"{name}, {ROUNDED_LAST}", GPTQ, group, pairs, seed, tokens, rounded_last=True),
    ]


def matrix(groups: list[int], tokens: int, growth: tuple, quick: bool = False) -> list[Row]:
    """Rows in the order of their worth. groups: sizes that the model takes, the main one first."""
    main, *others = groups
    short = {"published": PUBLISHED, "default": {}}
    anchors = {"published": PUBLISHED, "plain clip": PLAIN_CLIP, "default": {}}
    rows = rtn_rows(main, tokens)[:1] + gptq_rows(anchors, main, 0, tokens)
    if quick:
        return rows
    rows += otherwise_rows(main, SEEDS[0], tokens)
    rows += rtn_rows(main, tokens)[1:]
    for amount in growth[-1:]:
        rows += gptq_rows(anchors, main, 0, amount)
    stacked, steps = dict(PLAIN_CLIP), {}
    for name, options in TOGETHER.items():
        stacked |= options
        steps[name] = dict(stacked)
    for seed in SEEDS[1:]:
        rows += gptq_rows(anchors, main, seed, tokens) + otherwise_rows(main, seed, tokens)
    alone = {name: {**PUBLISHED, **options} for name, options in ALONE.items()}
    products = {name: {**PUBLISHED, **options} for name, options in PRODUCTS.items()}
    rows += gptq_rows(steps, main, 0, tokens)
    rows += gptq_rows(INSTEAD, main, 0, tokens)
    for amount in growth[:1]:
        rows += gptq_rows(short, main, 0, amount)
    for group in others:
        rows += rtn_rows(group, tokens) + gptq_rows(anchors, group, 0, tokens)
    rows += gptq_rows(products, main, 0, tokens) + gptq_rows(alone, main, 0, tokens)
    rows += otherwise_rows(main, 0, tokens, "published", PUBLISHED)
    for amount in growth[1:-1]:
        rows += gptq_rows(short, main, 0, amount)
    for seed in SEEDS[1:]:  # all there is would be the same text
        for amount in growth[:-1]:
            rows += gptq_rows(short, main, seed, amount)
    for group in others:
        rows += gptq_rows(steps, group, 0, tokens) + gptq_rows(alone, group, 0, tokens)
    return rows
