"""One quantization from start to end: walk, keep each finished layer, put Marlin layers in."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor, nn

from . import export, report, walk
from .phases import phase
from .plan import Plan
from .resume import Store, pack_all


def quantize(
    model: nn.Module,
    plan: Plan,
    samples: list[Tensor],
    store: Store,
    *,
    method: str = "gptq",
    device: torch.device | str = "cpu",
    on_result: Callable[[walk.Result], None] = lambda result: None,
    skip_bad_samples: bool = False,
    on_skip: Callable[[int, str], None] = lambda sample, place: None,
    **options,
) -> list[dict]:
    """Replace the plan's linears in ``model`` by Marlin layers; returns a report on each.

    model: on the CPU, best as ``export.load_model`` gives it in its stored type: then host memory
    holds a layer or two, and the packed weights are mapped from the store's files as well.
    samples: int64 (1, length) each; for method "rtn" they are not needed.
    The rest: see ``walk.quantize_gptq``.
    """
    writing: dict[int, Future] = {}
    told: dict[int, list[walk.Result]] = {}  # with what packing has to say
    writer = ThreadPoolExecutor(1, thread_name_prefix="writer")

    def write(index: int, results: list[walk.Result]) -> None:
        with phase("write"):  # from the GPU now: once it goes on, copies wait until it is through
            packed, told[index] = pack_all(results)
        writing[index] = writer.submit(store.write, index, told[index], packed)

    common = {
        "device": device, "on_result": on_result, "on_layer": write, "done": store.done,
    }  # fmt: skip
    if method == "rtn":
        steps = walk.quantize_rtn(model, plan, **common)
    else:
        steps = walk.quantize_gptq(
            model, plan, samples, skip_bad_samples=skip_bad_samples, on_skip=on_skip,
            **common, **options,
        )  # fmt: skip
    modules: list[dict] = []
    with writer:
        for index, results in enumerate(steps):
            with phase("write"):
                if index in writing:
                    writing.pop(index).result()
                export.replace(model, store.layers(index, model))
            modules += [report.module(result) for result in told.pop(index, results)]
    return modules
