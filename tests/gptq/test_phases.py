"""Seconds by phase: nested phases are taken out, everything adds up."""

import time

import pytest

from gptq.phases import OTHER, Phases, phase


def test_phases_exclude_what_is_nested_and_add_up():
    started = time.perf_counter()
    with Phases() as phases:
        time.sleep(0.02)
        for _ in range(2):
            with phase("solve"):
                time.sleep(0.02)
                with phase("factor"):
                    time.sleep(0.03)
    whole = time.perf_counter() - started
    assert set(phases.seconds) == {OTHER, "solve", "factor"}
    assert phases.seconds["factor"] >= 0.06 and phases.seconds["solve"] >= 0.04
    assert sum(phases.seconds.values()) == pytest.approx(whole, abs=2e-3)


def test_an_error_ends_its_phases():
    with pytest.raises(KeyError), Phases() as phases, phase("solve"), phase("factor"):
        raise KeyError
    with phase("nobody measures"):
        pass
    assert "nobody measures" not in phases.seconds
