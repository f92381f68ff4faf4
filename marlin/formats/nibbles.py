"""Eight 4-bit values in an int32 word, along rows or along columns, lowest nibble first.

Bytes are what is shifted, not words: a quarter of the memory traffic, and the same code runs on
the GPU. (Torch runs on little-endian machines only.)
"""

import torch
from torch import Tensor

IN_ORDER = (0, 1, 2, 3, 4, 5, 6, 7)


def unpack_rows(words: Tensor) -> Tensor:
    """int32 (r, n) -> uint8 (8 r, n): nibble j of row i is row 8 i + j."""
    rows, columns = words.shape
    codes = words.new_empty((rows, 8, columns), dtype=torch.uint8)
    for byte, pair in enumerate(bytes_of(words).unbind(-1)):
        pair = pair.contiguous()
        torch.bitwise_and(pair, 15, out=codes[:, 2 * byte])
        torch.bitwise_right_shift(pair, 4, out=codes[:, 2 * byte + 1])
    return codes.view(rows * 8, columns)


def pack_rows(codes: Tensor) -> Tensor:
    """The inverse of `unpack_rows`; k a multiple of 8."""
    k, columns = codes.shape
    codes = codes.reshape(k // 8, 8, columns)
    words = codes.new_empty((k // 8, columns), dtype=torch.int32)
    into = bytes_of(words)
    for byte in range(4):
        into[..., byte] = (codes[:, 2 * byte + 1] << 4) | codes[:, 2 * byte]
    return words


def unpack_columns(words: Tensor, order: tuple[int, ...] = IN_ORDER) -> Tensor:
    """int32 (r, w) -> uint8 (r, 8 w): nibble j of word i is column 8 i + order[j]."""
    rows, count = words.shape
    codes = words.new_empty((rows, count, 8), dtype=torch.uint8)
    for byte, pair in enumerate(bytes_of(words).unbind(-1)):
        codes[..., order[2 * byte]] = pair & 15
        codes[..., order[2 * byte + 1]] = pair >> 4
    return codes.view(rows, count * 8)


def pack_columns(codes: Tensor, order: tuple[int, ...] = IN_ORDER) -> Tensor:
    """The inverse of `unpack_columns`; the number of columns a multiple of 8."""
    rows, columns = codes.shape
    codes = codes.reshape(rows, columns // 8, 8)
    words = codes.new_empty((rows, columns // 8), dtype=torch.int32)
    into = bytes_of(words)
    for byte in range(4):
        high, low = codes[..., order[2 * byte + 1]], codes[..., order[2 * byte]]
        into[..., byte] = (high << 4) | low
    return words


def bytes_of(words: Tensor) -> Tensor:
    """A view (..., 4) of contiguous int32 words."""
    words = words.contiguous()
    return words.view(torch.uint8).view(*words.shape, 4)
