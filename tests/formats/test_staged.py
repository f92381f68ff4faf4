"""Saves that are really killed, at each of their steps: the old checkpoint or the new, and no rest.

What a living process is writing stays.
"""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import by_definition as by
import pytest

from marlin import shards
from marlin.convert import check_target, convert

OLD = {"config.json": "old", "model.safetensors": "old", "quantize_config.json": "old"}
NEW = {
    "config.json": "new", "model-00001-of-00002.safetensors": "new", "LICENSE": "new",
    "model.safetensors.index.json": "new", "model-00002-of-00002.safetensors": "new",
    "more/x": "new",
}  # fmt: skip
MINE = {"notes.txt": "mine", ".unfinished/layer": "mine"}
STEPS = ((os, "mkdir"), (Path, "rename"), (os, "unlink"), (os, "rmdir"))


def fill(directory, files):
    for name, text in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text)


def contents(directory):
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_text() for path in files}


def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def in_child(function) -> int:
    """Its exit status: 0, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        try:
            function()
            os._exit(0)
        finally:
            os._exit(77)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def save(target, files=NEW):
    with shards.staged(target) as stage:
        fill(stage, files)


def killed_at(step, work) -> int:
    """Do some work in a process that dies at the step of that number; its exit status."""

    def child():
        count = iter(range(1, 1000))
        for owner, name in STEPS:
            function = getattr(owner, name)
            setattr(
                owner,
                name,
                lambda *a, f=function, **k: (die if next(count) == step else f)(*a, **k),
            )
        work()

    return in_child(child)


def is_one_of_two(target, old):
    """Either checkpoint as a whole, which one: and nothing but what was there beside it."""
    found = contents(target)
    assert not [path for path in target.iterdir() if path.name.startswith(shards.LEFT)]
    assert found in (old | MINE, NEW | MINE)
    return found == NEW | MINE


@pytest.mark.parametrize("old", [OLD, {}], ids=["over", "fresh"])
def test_killed_at_any_step_it_is_the_old_checkpoint_or_the_new(old, tmp_path):
    outcomes = []
    for step in range(1, 100):
        target = tmp_path / str(step)
        fill(target, old | MINE)
        status = killed_at(step, lambda target=target: save(target))
        if status == 0:
            break
        assert status == -signal.SIGKILL
        shards.recover(target)
        outcomes.append(is_one_of_two(target, old))
        save(target)
        assert is_one_of_two(target, old)
    assert contents(target) == NEW | MINE
    assert outcomes == sorted(outcomes)  # the old first, from some step on the new
    assert outcomes.count(False) > len(old) and outcomes.count(True) > len(NEW) - 1


def test_killed_while_it_recovers_it_recovers(tmp_path):
    """From every place in the middle of the moves."""
    middles = 0
    for step in range(1, 100):
        start = tmp_path / str(step)
        fill(start, OLD | MINE)
        if killed_at(step, lambda start=start: save(start)) == 0:
            break
        if (start / "config.json").exists():
            continue
        middles += 1
        outcomes = set()
        for second in range(1, 100):
            target = tmp_path / f"{step}-{second}"
            shutil.copytree(start, target)
            status = killed_at(second, lambda target=target: shards.recover(target))
            shards.recover(target)
            outcomes.add(is_one_of_two(target, OLD))
            if status == 0:
                break
        assert len(outcomes) == 1 and second > 2
    assert middles == len(OLD) + len(NEW)


@pytest.mark.parametrize("name", shards.LEFT)
def test_folders_that_an_earlier_version_left(name, tmp_path):
    """Without those that belong to them. Files of that name are not ours."""
    fill(tmp_path, MINE | {".saving-": "mine", ".previous-mine": "mine"})
    fill(tmp_path / f"{name}a1", OLD)
    shards.recover(tmp_path)
    back = {} if name == shards.SAVING else OLD
    assert contents(tmp_path) == MINE | {".saving-": "mine", ".previous-mine": "mine"} | back


def test_what_another_process_is_writing_stays(tmp_path):
    target = tmp_path / "target"
    program = (
        "import sys; from pathlib import Path; from marlin import shards\n"
        f"with shards.staged(Path({str(target)!r})) as stage:\n"
        "    (stage / 'config.json').write_text('theirs')\n"
        "    print(stage.name, flush=True); sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        cwd=Path(shards.__file__).parents[1],
    ) as other:  # fmt: skip
        theirs = target / other.stdout.readline().strip()
        with pytest.raises(ValueError, match="is being written by another process"):
            check_target(tmp_path / "source", target, overwrite=False)
        save(target, OLD)
        assert contents(theirs) == {"config.json": "theirs"}
        other.kill()
        other.wait()
        with pytest.raises(ValueError, match="is not empty"):
            check_target(tmp_path / "source", target, overwrite=False)
    assert contents(target) == OLD and not theirs.exists()


def test_without_locks_nothing_that_may_be_alive_is_removed(tmp_path, monkeypatch):
    def none(*args):
        raise OSError(95, "Operation not supported")

    fill(tmp_path / ".saving-x", NEW)
    monkeypatch.setattr(shards.fcntl, "flock", none)
    save(tmp_path, OLD)
    assert contents(tmp_path) == OLD | {f".saving-x/{name}": text for name, text in NEW.items()}


def test_a_conversion_after_one_that_was_killed(tmp_path):
    weights = by.llama_weights()
    source = by.write_checkpoint(tmp_path / "source", by.gptq, weights, by.gptq_config())
    target = tmp_path / "target"

    def killed():
        shutil.copy2 = die
        convert(source, target, "marlin", overwrite=True)

    for overwrite in (False, True):
        assert in_child(killed) == -signal.SIGKILL
        assert [path for path in target.iterdir() if path.name.startswith(shards.SAVING)]
        convert(source, target, "marlin", overwrite=overwrite)
        assert not [path for path in target.iterdir() if path.name.startswith(".")]
