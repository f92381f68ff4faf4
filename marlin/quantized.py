"""A quantized weight as checkpoints state it: rows and columns in natural order, nothing packed."""

from __future__ import annotations

from typing import NamedTuple

import torch

LARGEST_CODE = 15
LARGEST_ZERO = 16  # GPTQ's files hold zero - 1 in four bits


class Quantized(NamedTuple):
    """A weight (k, n): row r, column c is (codes[r, c] - zeros[g, c]) · scales[g, c].

    Its group g is g_idx[r]; without g_idx the groups are runs of k / groups rows. Without zeros
    every zero is 8.
    """

    codes: torch.Tensor  # uint8 (k, n), 0 to 15
    scales: torch.Tensor  # float16 or bfloat16 (groups, n)
    zeros: torch.Tensor | None = None  # uint8 (groups, n), 0 to 16
    g_idx: torch.Tensor | None = None  # integers (k,), 0 to groups - 1

    def check(self) -> None:
        """Raises ValueError, saying what was expected and what came, where parts do not fit.

        Types of scales and sizes of groups are the layer's to judge.
        """
        codes, scales, zeros, g_idx = self
        if codes.dim() != 2 or scales.dim() != 2 or codes.shape[1] != scales.shape[1]:
            raise ValueError(
                "expected codes (k, n) and scales (groups, n), "
                f"got {tuple(codes.shape)} and {tuple(scales.shape)}"
            )
        k, groups = codes.shape[0], scales.shape[0]
        if k == 0 or groups == 0 or k % groups:
            raise ValueError(f"{groups} groups of scales do not divide k={k}")
        check_bytes("codes", codes, LARGEST_CODE)
        if zeros is not None:
            if zeros.shape != scales.shape:
                raise ValueError(
                    f"expected zeros {tuple(scales.shape)} like scales, got {tuple(zeros.shape)}"
                )
            check_bytes("zeros", zeros, LARGEST_ZERO)
        if g_idx is not None:
            if g_idx.shape != (k,) or g_idx.dtype not in (torch.int32, torch.int64):
                raise ValueError(
                    f"g_idx: expected int32 or int64 ({k},), got {g_idx.dtype} {tuple(g_idx.shape)}"
                )
            check_groups(g_idx, groups)

    def row_order(self) -> torch.Tensor | None:
        """int64 (k,): the rows sorted by group, in their order inside each; None if they are so."""
        if self.g_idx is None:
            return None
        in_order = row_groups(self.codes.shape[0], self.scales.shape[0], self.g_idx.device)
        if torch.equal(self.g_idx.long(), in_order):
            return None
        return torch.argsort(self.g_idx, stable=True).to(self.codes.device)


def check_bytes(name: str, values: torch.Tensor, largest: int) -> None:
    if values.dtype != torch.uint8:
        raise ValueError(f"{name} must be torch.uint8, got {values.dtype}")
    if not values.is_meta and values.numel() and values.max() > largest:
        raise ValueError(f"{name} must be 0 to {largest}, got {values.max().item()}")


def check_groups(g_idx: torch.Tensor, groups: int) -> None:
    """Raises ValueError unless each of the groups has as many rows as the others."""
    low, high = g_idx.min().item(), g_idx.max().item()
    if low < 0 or high >= groups:
        raise ValueError(f"g_idx must be 0 to {groups - 1}, got {low} to {high}")
    counts = torch.bincount(g_idx, minlength=groups)
    expected = g_idx.numel() // groups
    if uneven := (counts != expected).nonzero().flatten().tolist():
        raise ValueError(
            f"g_idx: expected {expected} rows in every group, "
            f"got {counts[uneven[0]].item()} in group {uneven[0]}"
        )


def row_groups(rows: int, groups: int, device: torch.device | None = None) -> torch.Tensor:
    """int64 (rows,): each row's group where groups are runs of rows."""
    return torch.arange(rows, device=device) // (rows // groups)
