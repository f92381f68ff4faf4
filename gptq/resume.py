"""Finished layers of a run that is not finished, so that no more than one is ever lost.

``OUT/.unfinished`` holds ``manifest.json``, which pins the model, the options and the calibration,
and ``layer-00000.safetensors`` and so on: the packed weights of one decoder layer each (``X.B`` and
``X.s`` of DESIGN §2.3), and in the file's metadata how every one of them went, and the manifest's
digest: layers of another run, should any be left, are not taken for this one's. A file gets its
name when it is complete, so killing the process at any moment leaves whole layers only. The final
checkpoint is written from these files, mapped rather than read: host memory never holds all of it.
Its report has the pins by the time that the folder goes, so that a finished run is known as one.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from marlin import ops
from marlin.layer import MarlinLinear
from marlin.shards import CONFIG, CheckpointError, list_tensors, read_json

from . import memory, report
from .plan import Plan, Target
from .solver import Solution
from .walk import Done, Result

FOLDER = ".unfinished"
MANIFEST = "manifest.json"
FORMAT = 2


class ResumeError(ValueError):
    """What lies there cannot be continued, or must not be lost."""


class Store:
    """The finished layers beside a checkpoint that is being made in ``out``.

    plan: what is quantized. pins: JSON values by name that a later run must share to go on.
    resume: go on after the last finished layer, from the start where there is none. restart: throw
    away what an earlier run has finished. Raises ResumeError when an earlier run left something
    and neither was asked for, or it was made with other pins.
    """

    def __init__(
        self, out: Path, plan: Plan, pins: dict, *, resume: bool = False, restart: bool = False
    ) -> None:
        self.folder = out / FOLDER
        self.plan = plan
        pins = _plain({"format": FORMAT, **pins})
        if restart:
            self.remove()
        manifest = self.folder / MANIFEST
        # Whatever they hold: layers of another plan must not be mixed with this one's.
        left = len(list(self.folder.glob("layer-*.safetensors"))) if manifest.exists() else 0
        if left and not resume:
            raise ResumeError(
                f"{self.folder}: an earlier run finished {left} of {len(plan.blocks)} "
                "layers; --resume goes on after them, --restart throws them away"
            )
        if left and (differences := _differences(_read(manifest), pins)):
            raise ResumeError(
                f"{self.folder}: expected the settings of the run that began there; "
                f"{differences}. The same settings go on, --restart starts over"
            )
        self._manifest = json.dumps(pins, indent=1, sort_keys=True) + "\n"
        self._digest = hashlib.sha256(self._manifest.encode()).hexdigest()
        self.begun = left > 0  # by an earlier run
        self.count = self._finished() if left else 0  # layers that need no more work

    @property
    def done(self) -> Done:
        """For the walk to go on from."""
        return Done(self.count, self.results)

    def write(self, index: int, results: list[Result], packed: dict[str, Tensor]) -> None:
        """Keep a finished layer. packed: from ``pack_all``."""
        if index == 0:  # what lies there is of no use to this run, and may be another's
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / MANIFEST).unlink(missing_ok=True)  # as in remove
            for layer in self.folder.glob("layer-*.safetensors"):
                layer.unlink()
            write_whole(self.folder / MANIFEST, lambda path: path.write_text(self._manifest))
        metadata = {
            "manifest": self._digest,
            "modules": json.dumps([report.module(result) for result in results]),
        }
        write_whole(self._path(index), lambda path: save_file(packed, path, metadata))

    def layers(self, index: int, model: nn.Module) -> dict[str, MarlinLinear]:
        """The packed layers of a finished decoder layer, mapped from its file; biases come from
        the linears in ``model`` that they stand for."""
        with safe_open(self._path(index), framework="pt") as file:
            layers = {}
            for target in self.plan.targets[index]:
                words, scales = (file.get_tensor(f"{target.name}.{part}") for part in "Bs")
                bias = model.get_submodule(target.name).bias
                bias = None if bias is None else bias.detach().to("cpu", copy=True)
                layers[target.name] = _layer(target, words, scales, bias)
        return layers

    def results(self, index: int) -> list[Result]:
        """What was written for a finished decoder layer."""
        with safe_open(self._path(index), framework="pt") as file:
            modules = {m["name"]: m for m in json.loads(file.metadata()["modules"])}
            return [
                report.result(
                    target,
                    modules[target.name],
                    _unpack(target, *(file.get_tensor(f"{target.name}.{p}").clone() for p in "Bs")),
                )
                for target in self.plan.targets[index]
            ]

    def remove(self) -> None:
        """Once everything is in the checkpoint. The manifest goes first: while it is there, the
        layers are."""
        (self.folder / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, index: int) -> Path:
        return self.folder / f"layer-{index:05d}.safetensors"

    def _finished(self) -> int:
        """How many layers from the first on are there, whole and of a run with this manifest."""
        for index, targets in enumerate(self.plan.targets):
            expected = {f"{target.name}.{part}" for target in targets for part in "Bs"}
            try:
                with safe_open(self._path(index), framework="pt") as file:
                    digest = (file.metadata() or {}).get("manifest")
                    if set(file.keys()) != expected or digest != self._digest:
                        return index
            except (OSError, SafetensorError):  # not there, or the machine went down in between
                return index
        return len(self.plan.targets)


def holds_a_run(out: Path) -> bool:
    """Whether a run wrote what lies in ``out``, to its end or not.

    A conversion of what it wrote has its report too, but is another checkpoint.
    """
    if (out / FOLDER).exists():
        return True
    try:
        quantization = read_json(out / CONFIG).get("quantization_config")
    except CheckpointError:
        return False
    marlin = isinstance(quantization, dict) and quantization.get("quant_method") == "marlin"
    return marlin and (out / report.FILE).exists()


def finished(out: Path, plan: Plan, pins: dict) -> bool:
    """Whether ``out`` holds the whole checkpoint of a run with these pins, as its report has them.

    Raises ResumeError for the checkpoint of a run with other pins, which must not be lost.
    """
    try:
        values = read_json(out / report.FILE)
        quantization = read_json(out / CONFIG).get("quantization_config")
        tensors = list_tensors(out)
    except CheckpointError:  # not there, or not whole: nothing to be lost
        return False
    targets = [target.name for target in plan.all_targets()]
    if not (isinstance(quantization, dict) and quantization.get("quant_method") == "marlin"):
        return False
    before = values.get("pins")
    if not isinstance(before, dict):
        raise ResumeError(
            f"{out / report.FILE}: a finished checkpoint's, which does not say with what settings "
            "it was made; --restart makes it anew"
        )
    if differences := _differences(before, _plain(pins)):
        raise ResumeError(
            f"{out}: expected the settings that its finished checkpoint was made with; "
            f"{differences}. --restart makes it anew"
        )
    return all(f"{name}.{part}" in tensors for name in targets for part in "Bs")


def pack(solution: Solution, bias: Tensor | None = None) -> MarlinLinear:
    """A Marlin layer, packed where the solution is if the operators for that are there."""
    if solution.codes.device.type == "cuda" and ops.why_no_cuda():
        solution = solution.cpu()
    return MarlinLinear.from_quantized(solution.codes, solution.scales, bias)


def pack_all(results: list[Result]) -> tuple[dict[str, Tensor], list[Result]]:
    """The tensors of a finished layer's file, in host memory; and the results, of which those that
    the GPU had no room to pack say so."""
    tensors: dict[str, Tensor] = {}
    told = []
    for result in results:
        layer, note = memory.or_on_cpu("packed", pack, result.solution)
        told.append(replace(result, note=memory.both(result.note, note)))
        tensors[f"{result.target.name}.B"] = layer.B.cpu()
        tensors[f"{result.target.name}.s"] = layer.s.cpu()
    return tensors, told


def _layer(target: Target, words: Tensor, scales: Tensor, bias: Tensor | None) -> MarlinLinear:
    group = target.k // scales.shape[0]
    layer = MarlinLinear(
        target.k, target.n, bias is not None, group_size=group, dtype=scales.dtype, device="meta"
    )
    layer.B, layer.s, layer.bias = words, scales, bias
    return layer


def _unpack(target: Target, words: Tensor, scales: Tensor) -> Solution:
    codes, scales = ops.unpack(words), ops.unpack_scales(scales)
    return Solution(codes[:, : target.n].contiguous(), scales[:, : target.n].contiguous())


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Under another name first: a file with its own name is complete."""
    unfinished = path.with_name(path.name + ".part")
    write(unfinished)
    os.replace(unfinished, path)


def _read(manifest: Path) -> dict:
    try:
        return json.loads(manifest.read_text())
    except (OSError, ValueError) as error:
        raise ResumeError(f"{manifest}: {error}; --restart starts over") from error


def _plain(pins: dict) -> dict:
    """As JSON gives them back, where tuples are lists."""
    return json.loads(json.dumps(pins))


def _differences(before: dict, now: dict) -> str:
    """In words; empty if there are none."""
    before, now = _flat(before), _flat(now)
    return "; ".join(
        f"{name} was {_short(before.get(name))}, now {_short(now.get(name))}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    )


def _flat(pins: dict) -> dict:
    """One level of names within names: options.damping."""
    flat = {}
    for name, value in pins.items():
        inner = value if isinstance(value, dict) else {}
        flat |= {f"{name}.{key}": part for key, part in inner.items()} or {name: value}
    return flat


def _short(value) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else text[:117] + "..."
