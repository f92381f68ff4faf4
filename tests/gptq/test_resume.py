"""Runs that are really killed, and go on: the layer at hand is lost, the result is the same."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from models import save
from safetensors.torch import load_file

from gptq import cli, export, resume, robust, solver
from gptq.plan import Plan, Target
from gptq.walk import Result

ROOT = Path(__file__).parents[2]
LAYERS = 3


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A model, and what an uninterrupted run makes of it."""
    folder = tmp_path_factory.mktemp("resume")
    save("llama", folder / "model")
    (folder / "text.txt").write_text("for name in names:\n    print(name, len(name))\n" * 60)
    assert quantize(folder, "whole") == 0
    return folder


def arguments(work, out, *more):
    return [
        "quantize", str(work / "model"), "--out", str(work / out), "--group-size", "32",
        "--tokens", "500", "--seqlen", "96", "--device", "cpu",
        "--calibration", str(work / "text.txt"), *more,
    ]  # fmt: skip


def quantize(work, out, *more):
    return cli.main(arguments(work, out, *more))


def killed(work, out, sabotage, *more) -> None:
    """Run in a child process that ``sabotage`` has prepared to kill itself at some moment."""
    child = os.fork()
    if child == 0:
        try:
            sabotage()
            quantize(work, out, *more)
        finally:  # it should be dead by now
            os._exit(77)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def calls_before(count, function, then=die):
    """``function``, and something else from call ``count`` on."""
    seen = []

    def counting(*args, **kwargs):
        seen.append(1)
        return (then if len(seen) > count else function)(*args, **kwargs)

    return counting


def while_solving():  # the second layer's third group of linears
    robust.solve = calls_before(4 + 2, robust.solve)


def while_writing_a_layer():
    def half(tensors, path, metadata):
        write(tensors, path, metadata)
        os.truncate(path, os.path.getsize(path) // 2)
        die()

    write = resume.save_file
    resume.save_file = calls_before(1, write, half)


def before_a_layer_has_its_name():
    os.replace = calls_before(2, os.replace)  # the manifest's, the first layer's


def while_saving_the_checkpoint():
    def part(model, directory, tokenizer):
        (directory / ".saving-x").mkdir()
        (directory / ".saving-x" / "model.safetensors").write_bytes(b"half of it")
        die()

    export.save_pretrained = part


def before_the_rest_is_removed():
    resume.Store.remove = die


def same_checkpoints(one, other):
    assert {p.name for p in one.glob("*.safetensors")} == {"model.safetensors"}
    expected, got = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert expected.keys() == got.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, got[name]), name
    before, after = (
        json.loads((folder / "gptq_report.json").read_text()) for folder in (one, other)
    )
    timeless = ("name", "method", "loss", "rtn_loss", "tokens", "damping", "note", "dead_inputs")
    for a, b in zip(before["modules"], after["modules"], strict=True):
        assert [a[field] for field in timeless] == [b[field] for field in timeless]


@pytest.mark.parametrize(
    "sabotage, finished",
    [
        (while_solving, 1),
        (while_writing_a_layer, 1),
        (before_a_layer_has_its_name, 1),
        (while_saving_the_checkpoint, LAYERS),
        (before_the_rest_is_removed, LAYERS),
    ],
)
def test_killed_at_a_bad_moment_it_goes_on_to_the_same_result(work, sabotage, finished, capsys):
    out = f"killed_{sabotage.__name__}"
    killed(work, out, sabotage)
    solved = []
    with pytest.MonkeyPatch.context() as patch:
        solve = robust.solve
        patch.setattr(robust, "solve", lambda *args, **o: solved.append(1) or solve(*args, **o))
        assert quantize(work, out, "--resume") == 0
    assert len(solved) == 4 * (LAYERS - finished)
    said = f"Going on after {finished} of {LAYERS} layers" in capsys.readouterr().out
    assert said == (finished > 0)
    same_checkpoints(work / "whole", work / out)
    assert not list((work / out).glob(".*"))  # .unfinished, .saving-...


def after_all_is_done():
    remove = resume.Store.remove
    resume.Store.remove = lambda store: (remove(store), die())


def while_the_rest_is_removed():
    def half(path, **options):
        if path.name == resume.FOLDER:
            (path / "layer-00000.safetensors").unlink()
            die()
        remove(path, **options)

    remove, shutil.rmtree = shutil.rmtree, half


def state(folder):
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("sabotage", [after_all_is_done, while_the_rest_is_removed, None])
def test_what_is_finished_is_not_made_again(work, sabotage, capsys):
    out = f"finished_{sabotage.__name__}" if sabotage else "whole"
    if sabotage:
        killed(work, out, sabotage)
    before = state(work / out)
    capsys.readouterr()
    assert quantize(work, out, "--resume") == 0
    said = capsys.readouterr().out
    assert f"{work / out} is finished" in said and "Loading" not in said
    left = state(work / out)
    assert left.items() <= before.items() and not (work / out / resume.FOLDER).exists()
    assert {p.name for p in before.keys() - left.keys()} <= {
        f"layer-{n:05d}.safetensors" for n in range(LAYERS)
    }
    same_checkpoints(work / "whole", work / out)
    for wrong, message in (
        (("--damping", "0.02"), "options.damping was 0.01, now 0.02"),
        (("--dtype", "float32"), 'dtype was "float16", now "float32"'),
    ):
        assert quantize(work, out, "--resume", *wrong) == 2
        (error,) = [e for e in capsys.readouterr().err.splitlines() if e.startswith("marlin: er")]
        assert message in error and "--restart makes it anew" in error
    assert state(work / out) == left


def test_what_is_no_longer_whole_is_made_again(work, capsys):
    shutil.copytree(work / "whole", work / "spoiled")
    weights = work / "spoiled" / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 1)
    assert quantize(work, "spoiled", "--resume") == 0
    assert "Loading" in capsys.readouterr().out
    same_checkpoints(work / "whole", work / "spoiled")
    report = work / "spoiled" / "gptq_report.json"
    values = json.loads(report.read_text())
    del values["pins"]  # as reports of before have none
    report.write_text(json.dumps(values))
    assert quantize(work, "spoiled", "--resume") == 2
    assert "does not say with what settings" in capsys.readouterr().err
    assert quantize(work, "spoiled", "--restart") == 0


def test_killed_from_outside(work):
    """A process of its own, SIGKILL as soon as it has finished a layer."""
    command = [sys.executable, "-m", "gptq", *arguments(work, "outside")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # as here: for the same bits
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    first = work / "outside" / resume.FOLDER / "layer-00000.safetensors"
    while not first.exists() and process.poll() is None:
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL and first.exists()
    assert quantize(work, "outside", "--resume") == 0
    same_checkpoints(work / "whole", work / "outside")


def test_what_is_left_is_neither_lost_nor_mixed(work, capsys):
    killed(work, "left", while_solving)
    left = work / "left" / resume.FOLDER / "layer-00000.safetensors"
    stamp = left.stat().st_mtime_ns

    def refused(*more):
        assert quantize(work, "left", *more) == 2
        assert left.stat().st_mtime_ns == stamp
        return capsys.readouterr().err.splitlines()[-1]

    message = refused()
    assert "finished 1 of 3 layers; --resume goes on after them, --restart throws" in message
    message = refused("--resume", "--group-size", "-1", "--damping", "0.02", "--seed", "3")
    assert "group_size was 32, now -1" in message
    assert "options.damping was 0.01, now 0.02" in message and "clip" not in message
    assert "text was" in message and "model" not in message
    config = work / "model" / "model.safetensors"
    os.utime(config, ns=(1, config.stat().st_mtime_ns + 1))
    assert "model.files was" in refused("--resume")
    assert quantize(work, "left", "--restart") == 0
    same_checkpoints(work / "whole", work / "left")


def test_layers_that_are_damaged_are_made_again(work, capsys):
    killed(work, "damaged", while_saving_the_checkpoint)
    second = work / "damaged" / resume.FOLDER / "layer-00001.safetensors"
    os.truncate(second, second.stat().st_size - 1)  # as a power failure may leave it
    capsys.readouterr()
    assert quantize(work, "damaged", "--resume") == 0
    assert "Going on after 1 of 3 layers" in capsys.readouterr().out
    same_checkpoints(work / "whole", work / "damaged")


def test_layers_of_another_plan_are_not_taken_for_its_own(tmp_path):
    """Even where the first layer has other linears than theirs, so that none counts as finished."""

    def store(names, **more):
        targets = [[Target(name, 64, 64)] for name in names]
        return resume.Store(tmp_path, Plan(32, ["0", "1"], targets), {"layers": names}, **more)

    before = store(["0.a", "1.a"])
    for index in range(2):
        target = before.plan.targets[index][0]
        result = Result(target, solver.rtn(torch.randn(64, 64), 32), "rtn")
        before.write(index, [result], resume.pack_all([result])[0])
    with pytest.raises(resume.ResumeError, match="finished 2 of 2 layers"):
        store(["0.b", "1.a"])
    with pytest.raises(resume.ResumeError, match="layers was"):
        store(["0.b", "1.a"], resume=True)
    assert store(["0.a", "1.a"], resume=True).count == 2
    assert store(["0.b", "1.a"], restart=True).count == 0


def store_of(tmp_path, pins, **more):
    targets = [[Target(f"{index}.a", 64, 64)] for index in range(LAYERS)]
    plan = Plan(32, [str(index) for index in range(LAYERS)], targets)
    return resume.Store(tmp_path, plan, pins, **more)


def write(store, *indices):
    for index in indices:
        result = Result(store.plan.targets[index][0], solver.rtn(torch.randn(64, 64), 32), "rtn")
        store.write(index, [result], resume.pack_all([result])[0])


def test_layers_of_a_run_with_other_settings_are_not_taken_for_its_own(tmp_path):
    """Left by a process that was killed while it removed them, or written by another one since."""
    before = store_of(tmp_path, {"damping": 0.5})
    write(before, 0, 1, 2)
    layers = [(path.name, path.read_bytes()) for path in before.folder.glob("layer-*")]
    (before.folder / resume.MANIFEST).unlink()  # what goes first
    now = store_of(tmp_path, {"damping": 0.01})
    assert (now.begun, now.count) == (False, 0)
    write(now, 0)
    assert len(list(now.folder.glob("layer-*"))) == 1  # theirs are gone
    for name, content in layers[::-1]:
        if name != "layer-00000.safetensors":
            (now.folder / name).write_bytes(content)
    assert store_of(tmp_path, {"damping": 0.01}, resume=True).count == 1
    write(now, 1)
    assert store_of(tmp_path, {"damping": 0.01}, resume=True).count == 2


def test_two_runs_killed_one_after_the_other_are_not_mixed(work, capsys):
    """The first while it removes its layers, the second, of other settings, after one of its own.
    Going on gives what the second alone would have given."""

    def while_the_first_is_removed():
        remove = shutil.rmtree
        shutil.rmtree = lambda path, **options: (
            die() if path.name == resume.FOLDER else remove(path, **options)
        )

    def after_a_layer():
        resume.Store.write = calls_before(1, resume.Store.write)

    killed(work, "mixed", while_the_first_is_removed, "--damping", "0.5")
    shutil.copytree(work / "mixed" / resume.FOLDER, work / "mixed_left")
    assert not (work / "mixed_left" / resume.MANIFEST).exists()
    assert len(list((work / "mixed_left").iterdir())) == LAYERS
    killed(work, "mixed", after_a_layer, "--overwrite")
    capsys.readouterr()
    assert quantize(work, "mixed", "--resume") == 0
    assert f"Going on after 1 of {LAYERS} layers" in capsys.readouterr().out
    same_checkpoints(work / "whole", work / "mixed")


def test_resume_without_anything_to_resume_starts(work, capsys):
    assert quantize(work, "fresh", "--resume") == 0
    assert "Going on" not in capsys.readouterr().out
    same_checkpoints(work / "whole", work / "fresh")


def test_rounding_resumes_too(work):
    def at_once():
        resume.Store.write = calls_before(2, resume.Store.write)

    child_arguments = ("--method", "rtn")
    assert quantize(work, "rtn", *child_arguments) == 0
    child = os.fork()
    if child == 0:
        try:
            at_once()
            quantize(work, "rtn_killed", *child_arguments)
        finally:
            os._exit(77)
    os.waitpid(child, 0)
    assert quantize(work, "rtn_killed", *child_arguments, "--resume") == 0
    same_checkpoints(work / "rtn", work / "rtn_killed")


@pytest.mark.parametrize("group_size, n", [(32, 64), (64, 40), (-1, 100)])
def test_results_come_back_as_they_were(group_size, n, tmp_path):
    target = Target("layers.0", 128, n)
    plan = Plan(group_size, ["layers.0"], [[target]])
    weight = torch.randn(128, n)
    solution = solver.gptq(weight, torch.eye(128), group_size)
    result = Result(target, solution, "gptq", 0.1, 0.2, 17, 3, 0.25, 1000, "a note", 2000)
    store = resume.Store(tmp_path, plan, {})
    store.write(0, [result], resume.pack_all([result])[0])
    store = resume.Store(tmp_path, plan, {}, resume=True)
    assert store.count == 1
    (again,) = store.done.results(0)
    assert torch.equal(again.solution.codes, solution.codes)
    assert torch.equal(again.solution.scales, solution.scales)
    assert again.solution.damping == solution.damping
    fields = ("target", "method", "loss", "rtn_loss", "tokens", "dead_inputs", "seconds",
              "peak_bytes", "note", "peak_host_bytes")  # fmt: skip
    assert all(getattr(again, field) == getattr(result, field) for field in fields)
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList([torch.nn.Linear(128, n)])
    layer = store.layers(0, model)["layers.0"]
    assert torch.equal(layer.dequantize().t(), solution.dequantize().half())
    assert torch.equal(layer.bias, model.layers[0].bias)
