"""Random problems through every configuration there is, drawn and shrunk by hypothesis.

A few hundred in the suite, the same each time. `make fuzz` runs 20,000 on a GPU, from another seed
each time. Data are made and judged where the operator runs, against float64; every operand lies
between guard bytes that read as NaN and have to stay as they are.

MARLIN_EXAMPLES says how many; MARLIN_SEED, which a run prints, repeats one.
"""

import os
import zlib
from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from marlin import host, ops
from marlin.testing.problems import check_product
from marlin.testing.shapes import GPUS, GROUP_SIZES, ROWS

EXAMPLES = int(os.environ.get("MARLIN_EXAMPLES", 300))
SEED = int(os.environ.get("MARLIN_SEED", 0))
ROUND = 1000  # examples that hypothesis draws before it starts afresh: its own memory grows slow
HALVES = [torch.float16, torch.bfloat16]
GUARD_BYTES = 1024  # a multiple of 16, so that what lies between stays aligned
GUARD = 0xFF  # as FP16, BF16 or FP32: NaN


@dataclass(frozen=True)
class Case:
    """What a failure prints, and all that is needed to see it again."""

    m: int
    k: int
    n: int
    group_size: int
    dtype: torch.dtype
    scale_dtype: torch.dtype
    bias_dtype: torch.dtype | None
    zeros: bool
    config: str | None
    pitch: int | None  # elements between rows of the activations; None: k
    shift: int  # elements before the first row
    mean: float  # of the activations


def configs(device: str) -> list[str | None]:
    """Every configuration that a device can run, by name; None for whatever is selected."""
    if device == "cpu":
        return [None, *host.cpu_kernels()]
    limit = torch.cuda.get_device_properties(0).shared_memory_per_block_optin
    like = [f"like:{sms}:{shared}" for _, sms, shared in GPUS.values() if shared <= limit]
    shapes = host.kernel_shapes().items()
    fitting = [name for name, shape in shapes if shape.get("shared_bytes", 0) <= limit]
    return [None, "reference", "dense", *like, *fitting]


def most_runs(config: str, m: int, k: int, n: int) -> int:
    """The number of tiles that a named shape cuts a problem into; 0 if it is no such name."""
    shape = host.kernel_shapes().get(config, {})
    if not {"rows", "columns", "depth"} <= shape.keys():
        return 0
    return -(-m // shape["rows"]) * -(-n // shape["columns"]) * -(-k // shape["depth"])


@st.composite
def cases(draw, device: str, most_rows: int, most_weights: int) -> Case:
    group_size = draw(st.sampled_from(GROUP_SIZES))
    unit = 16 if group_size == -1 else group_size
    k = unit * draw(st.integers(1, min(4096, most_weights // 64) // unit) | st.integers(1, 8))
    n = 64 * draw(st.integers(1, max(1, min(most_weights // k, 2560) // 64)))
    m = draw(
        st.integers(0, 40)
        | st.sampled_from([rows for rows in ROWS if rows <= most_rows])
        | st.sampled_from(range(41, most_rows + 1))
    )
    zeros = draw(st.integers(0, 9)) == 0
    config = draw(st.sampled_from(configs(device)))
    if zeros and device == "cuda":
        config = draw(st.sampled_from([None, "reference", "dense"]))  # all that take them
    elif (runs := most_runs(config, m, k, n)) > 0 and draw(st.booleans()):
        config = f"{config}@{draw(st.integers(1, min(runs, 300)))}"
    pitch = draw(st.none() | st.integers(0, 40) | st.integers(0, 5).map(lambda i: 8 * i))
    return Case(
        m, k, n, group_size,
        dtype=draw(st.sampled_from(HALVES)),
        scale_dtype=draw(st.sampled_from(HALVES)),
        bias_dtype=draw(st.sampled_from([None, None, *HALVES, torch.float32])),
        zeros=zeros,
        config=config,
        pitch=None if pitch is None else k + pitch,
        shift=draw(st.sampled_from([0, 0, 0, 1, 8])),
        mean=draw(st.sampled_from([0.0, 0.0, 0.0, 8.0])),
    )  # fmt: skip


class Guarded:
    """Copies of tensors, each between guard bytes of its own."""

    def __init__(self):
        self.parts = []  # (everything, as it was, bytes of the tensor inside)

    def put(self, tensor: torch.Tensor) -> torch.Tensor:
        size = tensor.numel() * tensor.itemsize
        memory = torch.full(
            (size + 2 * GUARD_BYTES,), GUARD, dtype=torch.uint8, device=tensor.device
        )
        inside = memory[GUARD_BYTES : GUARD_BYTES + size].view(tensor.dtype).view(tensor.shape)
        inside.copy_(tensor)
        self.parts.append((memory, memory.clone(), size))
        return inside

    def check(self, written: torch.Tensor) -> None:
        """Asserts that nothing has changed but what lies inside `written`."""
        for memory, before, size in self.parts:
            if written.data_ptr() == memory.data_ptr() + GUARD_BYTES:
                memory = torch.cat([memory[:GUARD_BYTES], memory[GUARD_BYTES + size :]])
                before = torch.full_like(memory, GUARD)
            assert torch.equal(memory, before), "bytes outside of the output were written"


def run(case: Case, device: str, matmul_out=ops.matmul_out) -> None:
    """Multiplies twice and asserts that all is as it should be."""
    c, generator = case, torch.Generator(device).manual_seed(zlib.crc32(repr(case).encode()))
    made = {"device": device, "generator": generator}
    groups = 1 if c.group_size == -1 else c.k // c.group_size
    codes = torch.randint(0, 16, (c.k, c.n), dtype=torch.uint8, **made)
    scales = (torch.rand(groups, c.n, **made) * 0.02 + 0.001).to(c.scale_dtype)
    scales *= torch.randint(0, 8, (groups, c.n), **made).clamp(0, 2) - 1  # some negative, some 0
    zeros = torch.randint(0, 17, (groups, c.n), dtype=torch.uint8, **made) if c.zeros else None
    bias = None if c.bias_dtype is None else torch.randn(c.n, **made).to(c.bias_dtype)
    wide = torch.full((c.m, c.pitch or c.k), float("nan"), dtype=c.dtype, device=device)
    wide[:, : c.k] = torch.randn(c.m, c.k, **made) + c.mean

    guarded = Guarded()
    room = guarded.put(torch.cat([wide.new_full((c.shift,), float("nan")), wide.flatten()]))
    a = room[c.shift :].view(wide.shape)[:, : c.k]
    b, s = guarded.put(ops.pack(codes)), guarded.put(ops.pack_scales(scales))
    z = None if zeros is None else guarded.put(ops.pack_scales(zeros))
    given_bias = None if bias is None else guarded.put(bias)
    y = guarded.put(torch.full((c.m, c.n), float("nan"), dtype=c.dtype, device=device))

    matmul_out(a, b, s, y, given_bias, c.config, z)
    guarded.check(y)
    size = c.k // groups
    values = codes.double() - (8 if zeros is None else zeros.double().repeat_interleave(size, 0))
    check_product(y, a, values * scales.double().repeat_interleave(size, 0), bias)
    first = y.clone()
    y.fill_(float("nan"))
    matmul_out(a, b, s, y, given_bias, c.config, z)  # what the first left behind is clean
    assert torch.equal(y, first), "the same call gave other bits"


def family(config: str | None) -> str | None:
    """A configuration without its number of runs."""
    return config.partition("@")[0] if config else config


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_random_problems(device):
    done, refused, seen, failed = Counter(), Counter(), set(), []
    on_gpu = device == "cuda"
    examples = EXAMPLES if on_gpu else 60  # tests/ops go deeper; here it shows that this test works
    most = {"most_rows": 1100 if on_gpu else 70, "most_weights": 2**22 if on_gpu else 2**16}

    def right_once(case):
        # While a failure is being shrunk, every case must come out as it did before.
        if not failed and (case in seen or len(seen) >= examples):
            return
        try:
            run(case, device)
        except AssertionError:
            failed.append(case)
            raise
        except RuntimeError as error:
            # Not every configuration takes every problem. Whatever is selected does.
            if case.config is None or "config: expected one of" not in str(error):
                failed.append(case)
                raise
            refused[family(case.config)] += 1
        else:
            seen.add(case)
            done[family(case.config)] += 1

    rounds = 0
    while len(seen) < examples:
        draws = settings(
            max_examples=min(ROUND, examples),
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        drawn = given(case=cases(device, **most))(right_once)
        seed(SEED * 1000 + rounds)(draws(drawn))()
        rounds += 1
    print(f"{len(seen)} problems on {device}, MARLIN_SEED={SEED}:", dict(done))
    print("refused:", dict(refused))
    assert refused.total() < done.total()
    if examples >= 20 * len(configs(device)):
        never = set(configs(device)) - set(done)
        assert never <= set(refused), f"not once drawn: {never - set(refused)}"


# ------------------------------------------------------------------- it would notice

CASE = Case(5, 128, 128, 64, torch.float16, torch.float16, None, True, None, 136, 8, 0.0)


def spoil_an_element(a, b, s, y, *rest):
    ops.matmul_out(a, b, s, y, *rest)
    y[-1, -1] += 4 * (2 * y[-1, -1].abs() * 2**-10 + 2**-9)


def write_past_the_end(a, b, s, y, *rest):
    ops.matmul_out(a, b, s, y, *rest)
    y.as_strided((1,), (1,), y.storage_offset() + y.numel()).zero_()


def write_an_input(a, b, s, y, *rest):
    ops.matmul_out(a, b, s, y, *rest)
    s.view(torch.int16)[0, 0] += 1


def leave_an_element(a, b, s, y, *rest):
    ops.matmul_out(a[:, :].clone(), b, s, out := torch.empty_like(y), *rest)
    y.flatten()[1:] = out.flatten()[1:]


def read_past_a_row(a, b, s, y, *rest):
    further = a.as_strided(a.shape, a.stride(), a.storage_offset() + 1)
    ops.matmul_out(further, b, s, y, *rest)


def change_every_time(a, b, s, y, *rest, calls=[]):  # noqa: B006
    ops.matmul_out(a, b, s, y, *rest)
    calls.append(y)
    y[0, 0] = torch.nextafter(y[0, 0], y[0, 0] + len(calls) % 2)


def ignore_zeros(a, b, s, y, bias, config, zeros):
    ops.matmul_out(a, b, s, y, bias, config)


@pytest.mark.parametrize(
    "broken, message",
    [
        (spoil_an_element, "an element is .* its bound off"),
        (write_past_the_end, "bytes outside"),
        (write_an_input, "bytes outside"),
        (leave_an_element, "an element is nan"),
        (read_past_a_row, "an element is nan"),
        (change_every_time, "other bits"),
        (ignore_zeros, "an element is"),
    ],
)
def test_what_is_broken_is_noticed(broken, message):
    run(CASE, "cpu")
    with pytest.raises(AssertionError, match=message):
        run(CASE, "cpu", broken)


@pytest.mark.gpu
def test_no_configuration_is_forgotten():
    """The operator's own list of names, which an unknown one brings up."""
    b, s = ops.pack(torch.zeros(16, 64, dtype=torch.uint8)), torch.ones(1, 64).half()
    with pytest.raises(RuntimeError, match="config: expected one of") as error:
        ops.matmul(torch.ones(1, 16).half().cuda(), b.cuda(), s.cuda(), config="warp-drive")
    listed = str(error.value).partition("one of ")[2].partition(" that fits")[0].split(", ")
    assert len(listed) > 1 and set(listed) <= {"reference", "dense", *host.kernel_shapes()}
