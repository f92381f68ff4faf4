"""Where the seconds of a run go: load, forward, factor, solve, loss, write.

Code marks what it does with ``with phase("solve"):``; whoever wants to know opens a ``Phases``.
Without one the marks cost nothing. A phase within a phase is taken out of the outer one, so the
seconds add up to the whole.
"""

import contextlib
import time
from collections import Counter
from collections.abc import Iterator

import torch

OTHER = "other"
_open: list["Phases"] = []


class Phases:
    """Seconds by phase while open. Used as a context manager, one at a time."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.seconds: Counter[str] = Counter()
        self._device = torch.device(device)
        self._names = [OTHER]
        self._last = 0.0

    def __enter__(self) -> "Phases":
        self._last = time.perf_counter()
        _open.append(self)
        return self

    def __exit__(self, *error) -> None:
        self._mark(synchronize=error[0] is None)
        _open.remove(self)

    def _mark(self, synchronize: bool = True) -> None:
        """What passed since the last mark belongs to the innermost phase."""
        if synchronize and self._device.type == "cuda":  # kernels run on after their launch
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        self.seconds[self._names[-1]] += now - self._last
        self._last = now

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._mark()
        self._names.append(name)
        try:
            yield
            self._mark()
        finally:
            self._names.pop()


def phase(name: str) -> contextlib.AbstractContextManager:
    """Time what happens within as ``name``, if somebody measures."""
    return _open[-1].phase(name) if _open else contextlib.nullcontext()
