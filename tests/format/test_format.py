"""The weight format: golden vectors of the published package, DESIGN's table, three backends."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from marlin import host, ops

GOLDEN = sorted((Path(__file__).parent / "golden").glob("*.npz"))
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def packed_by_definition(codes: np.ndarray) -> np.ndarray:
    """The published table, written out: a third opinion that shares no code with csrc/format."""
    k, n = codes.shape
    nibbles = [(0, 0), (8, 0), (0, 8), (8, 8), (1, 0), (9, 0), (1, 8), (9, 8)]
    tiles = codes.reshape(k // 16, 16, n // 64, 64).swapaxes(1, 2).astype(np.uint32)
    words = np.zeros((k // 16, n // 64, 128), np.uint32)
    for lane in range(32):
        column, pair = divmod(lane, 4)
        for block in range(4):
            for nibble, (row, offset) in enumerate(nibbles):
                code = tiles[:, :, 2 * pair + row, 16 * block + column + offset]
                words[:, :, 4 * lane + block] |= code << np.uint32(4 * nibble)
    return words.reshape(k // 16, 2 * n).view(np.int32)


def test_golden_files_are_there():
    assert len(GOLDEN) == 5


@pytest.mark.parametrize("path", GOLDEN, ids=lambda p: p.stem)
@pytest.mark.parametrize("device", DEVICES)
def test_operators_match_golden(path, device):
    golden = {name: torch.from_numpy(array).to(device) for name, array in np.load(path).items()
              if name != "group_size"}  # fmt: skip
    assert torch.equal(ops.pack(golden["codes"]), golden["B"])
    assert torch.equal(ops.unpack(golden["B"]), golden["codes"])
    assert torch.equal(ops.pack_scales(golden["scales"]), golden["s"])
    assert torch.equal(ops.unpack_scales(golden["s"]), golden["scales"])


@pytest.mark.parametrize("path", GOLDEN, ids=lambda p: p.stem)
def test_host_matches_golden(path):
    golden = np.load(path)
    assert np.array_equal(host.pack(golden["codes"]), golden["B"])
    assert np.array_equal(host.unpack(golden["B"]), golden["codes"])
    assert np.array_equal(host.pack_scales(golden["scales"]), golden["s"])
    assert np.array_equal(host.unpack_scales(golden["s"]), golden["scales"])
    assert np.array_equal(packed_by_definition(golden["codes"]), golden["B"])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(k16=st.integers(1, 20), n64=st.integers(1, 9), seed=st.integers(0, 2**31))
def test_random_weights_agree(k16, n64, seed):
    codes = np.random.default_rng(seed).integers(0, 16, (16 * k16, 64 * n64), dtype=np.uint8)
    words = packed_by_definition(codes)
    assert np.array_equal(host.pack(codes), words)
    assert np.array_equal(ops.pack(torch.from_numpy(codes)).numpy(), words)
    assert np.array_equal(host.unpack(words), codes)
    assert np.array_equal(ops.unpack(torch.from_numpy(words)).numpy(), codes)


@pytest.mark.gpu
@pytest.mark.parametrize(("k", "n"), [(16, 64), (48, 192), (4096, 4096), (528, 11008)])
def test_cuda_agrees_with_cpu(k, n):
    codes = torch.randint(0, 16, (k, n), dtype=torch.uint8)
    words = ops.pack(codes)
    assert torch.equal(ops.pack(codes.cuda()).cpu(), words)
    assert torch.equal(ops.unpack(words.cuda()).cpu(), codes)
    for groups in (1, k // 16):
        scales = torch.randn(groups, n).half()
        s = ops.pack_scales(scales)
        assert torch.equal(ops.pack_scales(scales.cuda()).cpu(), s)
        assert torch.equal(ops.unpack_scales(s.cuda()).cpu(), scales)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16, torch.float32])
def test_dequantize(device, groups, scale_dtype, dtype):
    codes = torch.randint(0, 16, (192, 128), dtype=torch.uint8)
    scales = torch.randn(groups, 128).to(scale_dtype)
    scales[0, :3] = torch.tensor([float("nan"), float("inf"), 0.0])
    b, s = ops.pack(codes).to(device), ops.pack_scales(scales).to(device)
    values = (codes.float() - 8) * scales.float().repeat_interleave(192 // groups, 0)
    result = ops.dequantize(b, s, dtype).cpu()
    assert result.dtype == (dtype or scale_dtype)
    assert torch.equal(result.nan_to_num(7.0), values.to(result.dtype).nan_to_num(7.0))
    if scale_dtype == torch.float16 and device == "cpu" and dtype is None:
        from_host = host.dequantize(b.numpy(), s.numpy())
        assert np.array_equal(from_host, values.numpy(), equal_nan=True)


def test_host_errors():
    codes = np.zeros((16, 64), np.uint8)
    for wrong in (codes[:8], codes[:, :32], codes.astype(np.int32), codes + 16, codes.T):
        with pytest.raises(ValueError, match=r"codes: expected"):
            host.pack(wrong)
    with pytest.raises(ValueError, match=r"b: expected.*got int32 \(1, 100\)"):
        host.unpack(np.zeros((1, 100), np.int32))
    with pytest.raises(ValueError, match="scales: expected"):
        host.pack_scales(np.zeros((1, 64), np.float32))


def test_places_of_a_tile():
    """The introspection of the C++ table, a few entries by hand."""
    assert host.place_in_tile(0, 0) == (0, 0)
    assert host.place_in_tile(0, 7) == (9, 8)
    assert host.place_in_tile(4 * 31 + 3, 0) == (6, 48 + 7)
