"""Launches that may overlap with their neighbours (programmatic dependent launch): whatever runs
before a product may write anything it reads, whatever runs after may read or overwrite anything."""

import pytest
import torch

from marlin import ops
from marlin.testing.problems import random_rows, random_weight

pytestmark = pytest.mark.gpu
ROWS = (1, 16, 48, 100, 300)
SIZE = 2048


@pytest.fixture(scope="module")
def weights():
    return [random_weight(SIZE, SIZE, 128, device="cuda", seed=seed) for seed in range(3)]


def synchronized(a, weight, config=None):
    """The product by itself."""
    torch.cuda.synchronize()
    y = ops.matmul(a, weight.b, weight.s, config=config)
    torch.cuda.synchronize()
    return y


# By name: few CTAs, whose rings go round.
@pytest.mark.parametrize("config", [None, "h8x256x128x2@1", "h64x256x128x2@2", "hh256x256x64x4@1"])
@pytest.mark.parametrize("m", ROWS)
@pytest.mark.parametrize("captured", [False, True])
def test_everything_written_just_before(config, m, captured, weights):
    """Words, scales and rows come from copies, the result leaves by one: no kernel waits long."""
    inputs = [random_rows(m, SIZE, device="cuda", seed=seed) for seed in range(4)]
    expected = {(i, j): synchronized(a, w, config) for i, a in enumerate(inputs)
                for j, w in enumerate(weights)}  # fmt: skip
    a, b, s = inputs[0].clone(), weights[0].b.clone(), weights[0].s.clone()
    y = torch.empty(m, SIZE, dtype=a.dtype, device="cuda")
    order = [(i, j) for _ in range(4) for i in range(4) for j in range(3)]
    results = torch.empty(len(order), m, SIZE, dtype=a.dtype, device="cuda")

    def rounds():
        for place, (i, j) in enumerate(order):
            if place % 2:  # the words last, right before they are read
                a.copy_(inputs[i])
                s.copy_(weights[j].s)
                b.copy_(weights[j].b)
            else:
                b.copy_(weights[j].b)
                s.copy_(weights[j].s)
                a.copy_(inputs[i])
            ops.matmul_out(a, b, s, y, config=config)
            results[place].copy_(y)

    if captured:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            rounds()
    for _ in range(5):
        results.fill_(float("nan"))
        graph.replay() if captured else rounds()
        torch.cuda.synchronize()
        for place, key in enumerate(order):
            assert torch.equal(results[place], expected[key]), (place, key)


@pytest.mark.parametrize("m", ROWS)
@pytest.mark.parametrize("captured", [False, True])
def test_products_of_products(m, captured, weights):
    """A chain in which every launch reads what the one before wrote, over reused buffers."""
    start = random_rows(m, SIZE, device="cuda")
    y = start
    for weight in weights * 4:
        y = synchronized(y, weight) / 4  # stays in range
    buffers = [torch.empty_like(start) for _ in range(2)]

    def chain():
        buffers[0].copy_(start)
        for i, weight in enumerate(weights * 4):
            source, target = buffers[i % 2], buffers[(i + 1) % 2]
            ops.matmul_out(source, weight.b, weight.s, target)
            target.div_(4)

    if captured:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            chain()
    for _ in range(20):
        graph.replay() if captured else chain()
        assert torch.equal(buffers[0], y)


@pytest.mark.parametrize("m", ROWS)
@pytest.mark.parametrize("config", [None, "16x256x64x2", "dense", "reference"])
def test_without_overlap(m, config, weights):
    """The same bits, whatever the configuration."""
    a = random_rows(m, SIZE, device="cuda")
    unchained = f"unchained:{config}" if config else "unchained"
    for weight in weights:
        y = ops.matmul(a, weight.b, weight.s, config=unchained)
        assert torch.equal(y, ops.matmul(a, weight.b, weight.s, config=config))


def test_nothing_is_called_so(weights):
    a = random_rows(1, SIZE, device="cuda")
    for config in ("unchained:", "unchained:warp-drive", "unchained16x256x64x2"):
        with pytest.raises(RuntimeError, match="config: expected one of"):
            ops.matmul(a, weights[0].b, weights[0].s, config=config)


@pytest.mark.parametrize("m", ROWS)
def test_bare_chain(m, weights):
    """Nothing in between: products that overlap with one another only."""
    start = random_rows(m, SIZE, device="cuda") / 64
    scaled = [(w.b, w.s / 8) for w in weights * 4]
    y = start
    for b, s in scaled:
        torch.cuda.synchronize()
        y = ops.matmul(y, b, s)
    torch.cuda.synchronize()
    for _ in range(20):
        z = start
        for b, s in scaled:
            z = ops.matmul(z, b, s)
        assert torch.equal(z, y)
