"""Second moments of what a linear layer reads.

For one output row ``w`` the squared output error of rounding is ``e H eᵀ`` with ``e = w - ŵ`` and
``H`` the mean of ``x xᵀ`` over all tokens: everything the solver needs to know about the data.
"""

import torch
from torch import Tensor

HALVES = (torch.float16, torch.bfloat16)


class Hessian:
    """Running sum of ``x xᵀ`` over the tokens seen, in FP32, on one device.

    Layers that read the same input (q, k and v; gate and up) share one of these.
    """

    def __init__(self, k: int, device: torch.device | str = "cpu") -> None:
        self.sum = torch.zeros(k, k, dtype=torch.float32, device=device)
        self.tokens = 0

    def add(self, inputs: Tensor) -> None:
        """Accumulate ``inputs`` (..., k) of any floating type; every leading dimension is tokens.

        Raises ValueError when the last dimension is not k.
        """
        k = self.sum.shape[0]
        if inputs.shape[-1] != k:
            raise ValueError(
                f"inputs: expected (..., {k}) as in the first call, got {tuple(inputs.shape)}"
            )
        tokens = inputs.reshape(-1, k)
        if tokens.is_cuda and self.sum.is_cuda and tokens.dtype in HALVES:
            # Tensor cores multiply exactly and sum in FP32, and no FP32 copy is needed.
            torch.addmm(self.sum, tokens.T, tokens, out_dtype=torch.float32, out=self.sum)
        else:
            tokens = tokens.float()
            self.sum.addmm_(tokens.T, tokens)
        self.tokens += tokens.shape[0]

    def mean(self) -> Tensor:
        """The (k, k) FP32 average over tokens. Raises ValueError before any token was added."""
        if self.tokens == 0:
            raise ValueError("Hessian: expected at least one token before mean(), got none")
        return self.sum / self.tokens
