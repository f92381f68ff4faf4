"""Second moments of what a linear layer reads.

For one output row ``w`` the squared output error of rounding is ``e H eᵀ`` with ``e = w - ŵ`` and
``H`` the mean of ``x xᵀ`` over all tokens: everything the solver needs to know about the data.
"""

import copy

import torch
from torch import Tensor

HALVES = (torch.float16, torch.bfloat16)
PRODUCTS = {
    "own": None,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}
# Rows in one product with or for H, which is symmetric: what is behind them need not be looked at.
# Few enough to save almost half, many enough to keep the device busy.
ROWS_AT_ONCE = {"cpu": 256, "cuda": 2048}


class Hessian:
    """Running sum of ``x xᵀ`` over the tokens seen, in FP32, on one device.

    Layers that read the same input (q, k and v; gate and up) share one of these.

    products: a key of PRODUCTS, the type that inputs are rounded to before they are multiplied.
    "own" rounds nothing: products of FP16 and BF16 are exact and quick, anything wider is
    multiplied in FP32. "float16" ends at 65504, what is beyond becomes infinite. "float64" sums in
    FP64, too. Raises ValueError for any other.
    """

    def __init__(
        self, k: int, device: torch.device | str = "cpu", *, products: str = "own"
    ) -> None:
        if products not in PRODUCTS:
            raise ValueError(f"products: expected one of {', '.join(PRODUCTS)}, got {products!r}")
        self.products = PRODUCTS[products]
        exact = torch.float64 if self.products is torch.float64 else torch.float32
        self.sum = torch.zeros(k, k, dtype=exact, device=device)  # its lower half counts
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
        tokens = inputs.reshape(-1, k).to(self.products or inputs.dtype)
        # Tensor cores multiply halves exactly and sum in FP32, and no FP32 copy is needed.
        exact = tokens.is_cuda and self.sum.is_cuda and tokens.dtype in HALVES
        tokens = tokens if exact else tokens.to(self.sum.dtype)
        for rows in _parts(self.sum):
            part = self.sum[rows, : rows.stop]
            left, right = tokens[:, rows].T, tokens[:, : rows.stop]
            if exact:
                torch.addmm(part, left, right, out_dtype=torch.float32, out=part)
            else:
                part.addmm_(left, right)
        self.tokens += tokens.shape[0]

    def cpu(self) -> "Hessian":
        """The same, in host memory."""
        there = copy.copy(self)
        there.sum = self.sum.cpu()
        return there

    def mean(self) -> Tensor:
        """The (k, k) FP32 average over tokens. Raises ValueError before any token was added."""
        if self.tokens == 0:
            raise ValueError("Hessian: expected at least one token before mean(), got none")
        mean = (self.sum / self.tokens).float()
        for rows in _parts(mean):
            mean[rows, rows.stop :] = mean[rows.stop :, rows].T
        return mean


def energies(hessian: Tensor, columns: Tensor) -> Tensor:
    """(n,) xᵀ H x of every column x of (k, n), for a symmetric H (k, k) of the same dtype."""
    found = columns.new_zeros(columns.shape[1])
    for rows in _parts(hessian):
        part, before = columns[rows], slice(rows.start)
        seen = hessian[rows, rows] @ part
        seen.addmm_(hessian[rows, before], columns[before], alpha=2)
        found += seen.mul_(part).sum(dim=0)
    return found


def _parts(matrix: Tensor) -> list[slice]:
    k, step = len(matrix), ROWS_AT_ONCE[matrix.device.type]
    return [slice(start, min(start + step, k)) for start in range(0, k, step)]
