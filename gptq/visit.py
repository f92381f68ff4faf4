"""Modules on a device for a while, and back without a trace.

A model loaded from safetensors in its stored type takes no memory: its tensors are the mapped
files, read when they are touched. So what is on the device is a copy, what was there before comes
back for free, and the model streams through the device one layer at a time.
"""

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor, nn

from .memory import attempt


class Visit:
    """Parameters and buffers of some modules (not their children's), brought to a device.

    A context manager: what was there before is back at its end. dtype: what floating values are
    computed in, None for their own.
    """

    def __init__(
        self,
        modules: Iterable[nn.Module],
        device: torch.device | str,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._modules = list(modules)
        self._device, self._dtype = device, dtype
        self._parameters: dict[nn.Parameter, Tensor] = {}
        self._buffers: list[tuple[nn.Module, str, Tensor]] = []
        self._changed: set[nn.Parameter] = set()

    def __enter__(self) -> "Visit":
        return self

    def bring(self, read_ahead: "Future[dict[int, Tensor]] | None" = None) -> None:
        """Move them there, once. read_ahead: from ``read_ahead`` on the same modules.

        After an error (there is no room) they are where they were, and it may be tried again.
        """
        try:
            self._bring(read_ahead.result() if read_ahead else {})
        except BaseException:
            self._put_back()
            raise

    def _bring(self, ready: dict[int, Tensor]) -> None:
        for module in self._modules:
            for parameter in module._parameters.values():
                if parameter is not None and parameter not in self._parameters:
                    stored = self._parameters[parameter] = parameter.data
                    parameter.data = self._moved(ready.get(id(parameter), stored))
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    self._buffers.append((module, name, buffer))
                    module._buffers[name] = self._moved(buffer)

    def __exit__(self, *error) -> None:
        self._put_back()

    def _put_back(self) -> None:
        for parameter, stored in self._parameters.items():
            changed = parameter in self._changed
            parameter.data = parameter.data.to(stored.device) if changed else stored
        for module, name, buffer in self._buffers:
            module._buffers[name] = buffer
        self._parameters, self._buffers = {}, []

    def change(self, parameter: nn.Parameter, values: Tensor) -> None:
        """Give a parameter other values for good, of any type and on any device."""
        self._changed.add(parameter)
        if values.device == parameter.device:
            parameter.data = values.to(parameter.dtype)
        else:  # into the memory that it has: there may be no other
            parameter.data.copy_(values)

    def forget_all_but(self, parameters: Iterable[nn.Parameter]) -> None:
        """Leave what is not among these as it is: it has left the model."""
        self._parameters = {p: self._parameters[p] for p in parameters if p in self._parameters}

    def _moved(self, tensor: Tensor) -> Tensor:
        dtype = self._dtype if tensor.is_floating_point() else None
        return tensor.to(self._device, dtype, non_blocking=True)


_reader = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")


def read_ahead(modules: Iterable[nn.Module]) -> "Future[dict[int, Tensor]]":
    """Read parameters into page-locked memory while the GPU has other work; for ``Visit``."""
    stored = {
        id(parameter): parameter.data
        for module in modules
        for parameter in module._parameters.values()
        if parameter is not None and parameter.device.type == "cpu"
    }

    def read() -> dict[int, Tensor]:
        return {
            key: torch.empty_like(tensor, pin_memory=True).copy_(tensor)
            for key, tensor in stored.items()
        }

    # Where no memory can be locked, nothing is read before it is needed.
    return _reader.submit(lambda: attempt(read)[1] or {})
