"""Memory that runs out when a test wants it to."""

import torch


def out_of_memory_when(condition, monkeypatch, module, name):
    """Let a function fail as CUDA does, if ``condition`` says so of its arguments."""
    original = getattr(module, name)

    def failing(*args, **kwargs):
        if condition(*args):
            raise torch.OutOfMemoryError("CUDA out of memory (a test says so)")
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, failing)


def always(*args):
    return True


def at_first():
    """A condition that holds once."""
    once = iter([True])
    return lambda *args: next(once, False)


class Elsewhere(torch.Tensor):
    """A tensor that says it lives on a GPU until it is moved."""

    @property
    def device(self):
        return torch.device("cuda")

    def to(self, device):
        return self

    def cpu(self):
        return self.as_subclass(torch.Tensor)
