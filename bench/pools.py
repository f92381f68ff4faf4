"""Random operands on the GPU, drawn once: every cell cuts its rotating buffers from the same pools.

Any 32-bit word is eight valid codes, so packed weights need no packing.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from marlin import ops
from marlin.testing.problems import Weight, check_product
from marlin.testing.timing import ROTATE_BYTES, group_count, packed_bytes, rotation_count

CHECK_ELEMENTS = 1 << 27  # of a float64 block: 1 GiB, of which the check needs a few
CHECK_ROWS = 1024


@dataclass(frozen=True)
class PackedWeight:
    """One buffer of our operator: words int32 (k / 16, 2 n) and scales (groups, n)."""

    b: Tensor
    s: Tensor

    def check(self, y: Tensor, x: Tensor) -> None:
        """Asserts y = x · W against float64, block by block to bound the memory."""
        codes, scales = ops.unpack(self.b), ops.unpack_scales(self.s)
        k, n = codes.shape
        width = max(64, CHECK_ELEMENTS // k // 64 * 64)
        for left in range(0, n, width):
            columns = slice(left, left + width)
            values = Weight(codes[:, columns], scales[:, columns], self.b, self.s).values()
            for top in range(0, len(x), CHECK_ROWS):
                rows = slice(top, top + CHECK_ROWS)
                check_product(y[rows, columns], x[rows], values)


def check_dense(y: Tensor, x: Tensor, w: Tensor, rows: int = 64) -> None:
    """Asserts that the baseline computed x · W, loosely: a library is trusted, our call is not."""
    reference = x[:rows].float() @ w.float()
    error = (y[:rows].float() - reference).abs().mean() / reference.abs().mean()
    bound = 5e-3 if y.dtype == torch.float16 else 2e-2
    assert error.item() < bound, f"mean |error| / mean |reference| is {error.item():.3g}"


class Pools:
    """Random words, scales, dense weights and activations for a list of cells.

    Args:
        cells: the (k, n, m) to come.
        group_size: rows per scale, -1 for one group.
        dtype: float16 or bfloat16, of activations, scales and dense weights.
        device: where they live.
        dense: whether dense weights are needed at all.
        rotate_bytes: what the buffers of a cell come to at least.
    """

    def __init__(
        self, cells, group_size, dtype, device="cuda", dense=True, rotate_bytes=ROTATE_BYTES
    ):
        self.group_size, self.rotate_bytes = group_size, rotate_bytes
        generator = torch.Generator(device).manual_seed(1)
        shapes = {(k, n) for k, n, _ in cells}
        word_count = max(self.count(k, n, 4) * packed_bytes(k, n) // 4 for k, n in shapes)
        scale_count = max(self.count(k, n, 4) * group_count(k, group_size) * n for k, n in shapes)
        dense_count = max(self.count(k, n, 16) * k * n for k, n in shapes) if dense else 0

        def empty(count, kind=dtype):
            return torch.empty(count, dtype=kind, device=device)

        bounds = (-(2**31), 2**31)
        self.words = empty(word_count, torch.int32).random_(*bounds, generator=generator)
        self.scales = empty(scale_count).uniform_(0.001, 0.021, generator=generator)
        self.dense = empty(dense_count).normal_(0, 0.02, generator=generator)
        self.rows = empty(max(m * k for k, _, m in cells)).normal_(generator=generator)
        self.outputs = empty(max(2 * m * n for _, n, m in cells))

    def count(self, k: int, n: int, bits: int) -> int:
        """Buffers to rotate over."""
        return rotation_count(packed_bytes(k, n, bits), self.rotate_bytes)

    def packed_weights(self, k: int, n: int) -> list[PackedWeight]:
        groups = group_count(k, self.group_size)
        count, words, scales = self.count(k, n, 4), packed_bytes(k, n) // 4, groups * n
        return [
            PackedWeight(
                self.words[i * words : (i + 1) * words].view(k // 16, 2 * n),
                self.scales[i * scales : (i + 1) * scales].view(groups, n),
            )
            for i in range(count)
        ]

    def dense_weights(self, k: int, n: int, transposed: bool) -> list[Tensor]:
        """Dense (k, n) weights; transposed: stored (n, k) as nn.Linear stores them."""
        flat = [self.dense[i * k * n : (i + 1) * k * n] for i in range(self.count(k, n, 16))]
        return [w.view(n, k).t() if transposed else w.view(k, n) for w in flat]

    def activations(self, m: int, k: int) -> Tensor:
        return self.rows[: m * k].view(m, k)

    def output_pair(self, m: int, n: int) -> tuple[Tensor, Tensor]:
        """Two outputs (m, n), poisoned."""
        pair = self.outputs[: 2 * m * n].fill_(float("nan")).view(2, m, n)
        return pair[0], pair[1]
