"""What every test shares: the `gpu` marker skips where there is no GPU, and says so at the end.

MARLIN_REQUIRE_GPU=1 makes a missing GPU an error instead, for the machine that has one.
"""

import os

import pytest
from hypothesis import settings

# Two busy cores make any example slow now and then: no deadline. The same examples in every run:
# what fails in CI fails at home.
settings.register_profile("marlin", deadline=None, derandomize=True)
settings.load_profile("marlin")

SKIPPED_FOR_GPU = pytest.StashKey[list]()


def why_no_gpu() -> str | None:
    """What is missing for the tests marked `gpu`, or None."""
    import torch

    from marlin import ops

    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if torch.cuda.get_device_capability() < (8, 0):
        return f"{torch.cuda.get_device_name()} is older than compute capability 8.0"
    if missing := ops.why_no_cuda():
        return f"marlin has no CUDA operators: {missing}"
    return None


def pytest_collection_modifyitems(config, items):
    marked = [item for item in items if item.get_closest_marker("gpu")]
    reason = why_no_gpu() if marked else None
    if reason and os.environ.get("MARLIN_REQUIRE_GPU") == "1":
        raise pytest.UsageError(f"MARLIN_REQUIRE_GPU=1, but {reason}")
    if reason:
        config.stash[SKIPPED_FOR_GPU] = [len(marked), reason]
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_terminal_summary(terminalreporter, config):
    if skipped := config.stash.get(SKIPPED_FOR_GPU, None):
        count, reason = skipped
        terminalreporter.section("GPU", yellow=True)
        terminalreporter.line(f"{count} GPU tests did NOT run: {reason}", yellow=True, bold=True)
