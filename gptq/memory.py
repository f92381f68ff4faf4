"""When memory runs out: the same on the CPU, or an error that says what would help; and peaks."""

import resource
from collections.abc import Callable
from typing import Any

import torch

ON_CPU = "--device cpu would do"
SHORTER = f"shorter samples (--seqlen) or {ON_CPU}"
# As CUDA's libraries and the driver say it, where torch.OutOfMemoryError is not what is raised.
MESSAGES = ("ALLOC_FAILED", "CUDA error: out of memory")


class TooLittleMemoryError(ValueError):
    """The GPU has no room for something that cannot be done elsewhere."""


def out_of_memory(error: RuntimeError) -> bool:
    """Whether the GPU had no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or any(m in str(error) for m in MESSAGES)


def never() -> bool:
    """For ``make_room``, where there is nothing to move away."""
    return False


def attempt(
    function: Callable, *arguments, make_room: Callable[[], bool] = never
) -> tuple[bool, Any]:
    """Call it until the GPU has room for it: (True, what it returns), or (False, None).

    make_room: called when memory runs out; if it says that it has freed some there is another try.
    """
    while True:
        try:
            return True, function(*arguments)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
        # Outside the except block, whose error keeps the failed attempt's tensors alive.
        torch.cuda.empty_cache()
        if not make_room():
            return False, None


def or_on_cpu(
    what: str, function: Callable, *arguments, make_room: Callable[[], bool] = never
) -> tuple[Any, str | None]:
    """``function(*arguments)``, on copies in host memory if the GPU has no room for it.

    what: the work in the past tense. arguments: of which those with ``cpu()`` are copied, in lists
    too. make_room: see ``attempt``. Returns the result, and the note for the report if it was the
    CPU.
    """
    fits, result = attempt(function, *arguments, make_room=make_room)
    if fits:
        return result, None
    return function(*map(_in_host_memory, arguments)), note(what)


def note(what: str) -> str:
    """For the report: what was done on the CPU instead."""
    return f"CUDA out of memory: {what} on the CPU"


def both(first: str | None, second: str | None) -> str | None:
    """Two notes as one; None if there is neither."""
    return "; ".join(filter(None, (first, second))) or None


def must_fit(
    what: str,
    device: torch.device | str,
    function: Callable,
    *arguments,
    make_room: Callable[[], bool] = never,
    remedy: str = SHORTER,
) -> Any:
    """``function(*arguments)``, which only the GPU can do. what: it takes memory for; the rest: see
    ``attempt`` and ``too_little``. Raises TooLittleMemoryError."""
    fits, result = attempt(function, *arguments, make_room=make_room)
    if not fits:
        raise too_little(what, device, remedy)
    return result


def too_little(
    what: str, device: torch.device | str, remedy: str = SHORTER
) -> TooLittleMemoryError:
    """The error to raise: what did not fit, how much there is, and what would help."""
    return TooLittleMemoryError(
        f"{device}: expected memory for {what}, ran out{_state(device)}; {remedy}"
    )


def peaks(device: torch.device) -> tuple[int | None, int]:
    """Bytes of GPU memory at most since the last call, None for the CPU; bytes of host memory at
    most since the process began, mapped files included."""
    gpu = None
    if device.type == "cuda":
        gpu = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    return gpu, peak_host_bytes()


def peak_host_bytes() -> int:
    """Resident at most since the process began, mapped files included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _in_host_memory(value):
    if isinstance(value, list):
        return [_in_host_memory(item) for item in value]
    return value.cpu() if hasattr(value, "cpu") else value


def _state(device: torch.device | str) -> str:
    device = torch.device(device)
    if device.type != "cuda" or not torch.cuda.is_available():
        return ""
    try:
        free, total = torch.cuda.mem_get_info(device)
        allowed = torch.cuda.get_per_process_memory_fraction(device) * total
    except RuntimeError:  # no room even for the question
        return ""
    ours = torch.cuda.memory_allocated(device)
    return (
        f" with {ours / 1e9:.2f} GB in use here of {allowed / 1e9:.2f} GB allowed "
        f"and {free / 1e9:.2f} GB free"
    )
