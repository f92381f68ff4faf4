"""The CUDA operators among other work: graphs, streams, devices, compiled models."""

import pytest
import torch

from marlin import host, ops
from marlin.testing.problems import check_product, random_rows, random_weight
from marlin.testing.shapes import LIKE

pytestmark = pytest.mark.gpu
CONFIGS = [None, *host.kernel_shapes(), *LIKE.values()]  # None: whatever selection chooses


def shared_slices(config, m=40, n=576, k=2048):
    """A name of the configuration under which CTAs share every slice."""
    if config not in host.kernel_shapes():  # a selection, which has its own mind
        return config
    shape = host.kernel_shapes()[config]
    slices = -(-n // shape["columns"]) * -(-m // shape["rows"])
    return f"{config}@{min(3 * slices, 132)}"


@pytest.mark.parametrize("config", CONFIGS)
def test_graph_replays_with_changing_inputs(config):
    weight = random_weight(2048, 576, 128, device="cuda")
    values, config = weight.values(), shared_slices(config)
    a = random_rows(40, 2048, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ops.matmul(a, weight.b, weight.s, config=config)
    for seed in range(100):
        a.copy_(random_rows(40, 2048, seed=seed))
        y.fill_(float("nan"))
        graph.replay()
        assert torch.equal(y, ops.matmul(a, weight.b, weight.s, config=config))
        if seed % 25 == 0:
            check_product(y, a, values)


def test_first_call_ever_may_be_captured(tmp_path):
    """Nothing that a first call sets up (modules, counters) is forbidden while capturing."""
    import subprocess
    import sys

    script = """
import torch
from marlin import ops
from marlin.testing.problems import random_rows, random_weight
weight = random_weight(2048, 64, 128)
b, s = weight.b.cuda(), weight.s.cuda()
a = random_rows(4, 2048, device="cuda")
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    y = ops.matmul(a, b, s, config="16x256x64x2@8")
graph.replay()
assert torch.equal(y, ops.matmul(a, b, s, config="16x256x64x2@8"))
print("same")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "same", done.stderr


def test_a_launch_that_cuda_refuses_is_an_error_and_leaves_nothing_behind():
    """In a process of its own: a capture that was given up is no state to go on testing in."""
    import subprocess
    import sys

    script = """
import torch
from marlin import ops
from marlin.testing.problems import random_rows, random_weight
weight = random_weight(2048, 64, 128)
b, s, name = weight.b.cuda(), weight.s.cuda(), "16x256x64x2@8"  # eight CTAs share a slice
a = random_rows(4, 2048, device="cuda")
expected = ops.matmul(a, b, s, config=name)
y, stream, graph = torch.empty_like(expected), torch.cuda.Stream(), torch.cuda.CUDAGraph()

def refused(call):
    try:
        call()
    except RuntimeError as error:
        return str(error)
    raise AssertionError("was not refused")

with torch.cuda.stream(stream):
    graph.capture_begin()
    refused(stream.synchronize)  # nobody may while it captures: from here on nothing can start
    said = refused(lambda: ops.matmul_out(a, b, s, y, config=name))
    assert "launch: expected a kernel that starts, got cudaError" in said, said
    refused(graph.capture_end)
torch.cuda.synchronize()
for _ in range(3):
    y.fill_(float("nan"))
    ops.matmul_out(a, b, s, y, config=name)
    assert torch.equal(y, expected)
print("right")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "right", done.stderr


@pytest.mark.parametrize("config", CONFIGS)
def test_two_graphs_of_one_stream_replayed_at_once(config):
    """Captured one after the other on one stream, replayed on two: each with its own workspace."""
    weight = random_weight(8192, 576, 128, device="cuda")
    config = shared_slices(config, k=8192)
    rows = [random_rows(40, 8192, device="cuda", seed=seed) for seed in (1, 2)]
    expected = [ops.matmul(a, weight.b, weight.s, config=config) for a in rows]
    capture_stream = torch.cuda.Stream()
    graphs, outputs = [], []
    for a in rows:
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1], stream=capture_stream):
            for _ in range(20):
                y = ops.matmul(a, weight.b, weight.s, config=config)
            outputs.append(y)
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    for _ in range(30):
        for y in outputs:
            y.fill_(float("nan"))
        torch.cuda.synchronize()
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        torch.cuda.synchronize()
        for y, wanted in zip(outputs, expected, strict=True):
            assert torch.equal(y, wanted)


@pytest.mark.parametrize("config", CONFIGS)
def test_two_streams_at_once(config):
    weight = random_weight(8192, 576, 64, device="cuda")
    config = shared_slices(config, k=8192)
    rows = [random_rows(40, 8192, device="cuda", seed=seed) for seed in (1, 2)]
    expected = [ops.matmul(a, weight.b, weight.s, config=config) for a in rows]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    results = [[], []]
    for _ in range(50):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                results[i].append(ops.matmul(rows[i], weight.b, weight.s, config=config))
    torch.cuda.synchronize()
    for i in range(2):
        assert all(torch.equal(y, expected[i]) for y in results[i])


def test_input_written_by_the_kernel_before():
    weight = random_weight(4096, 512, 128, device="cuda")
    source = random_rows(16, 4096, device="cuda")
    expected = ops.matmul(source * 2, weight.b, weight.s)
    a = torch.zeros_like(source)
    for _ in range(50):
        a.fill_(float("nan"))
        torch.mul(source, 2, out=a)
        y = ops.matmul(a, weight.b, weight.s)
        a.fill_(float("nan"))  # and a successor overwrites what it read
        assert torch.equal(y, expected)


def test_compiled_with_graphs():
    """torch.compile's own CUDA graphs: their check of the memory pool sees no stray allocation."""
    weight = random_weight(1024, 1024, 128, device="cuda")

    @torch.compile(mode="reduce-overhead", fullgraph=True)
    def model(a):
        return ops.matmul(ops.matmul(a, weight.b, weight.s) / 64, weight.b, weight.s)

    with torch.inference_mode():
        for seed in range(6):
            a = random_rows(16, 1024, device="cuda", seed=seed)
            expected = ops.matmul(ops.matmul(a, weight.b, weight.s) / 64, weight.b, weight.s)
            torch.compiler.cudagraph_mark_step_begin()
            # Inductor may divide in FP32 and round once: equal up to that.
            torch.testing.assert_close(model(a), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU only")
def test_second_device():
    weight = random_weight(2048, 576, 128, device="cuda:1")
    a = random_rows(40, 2048, device="cuda:1")
    assert torch.cuda.current_device() == 0
    for config in map(shared_slices, CONFIGS):
        y = ops.matmul(a, weight.b, weight.s, config=config)
        assert y.device == a.device
        check_product(y, a, weight.values())


@pytest.mark.parametrize(
    "config", [None, "128x256x128x1", "h8x256x128x2", "hh256x256x64x4", "dense"]
)
def test_operands_of_more_than_two_to_the_31(config):
    """Offsets of 64 bits where sizes multiply: X and Y of 2.2e9 elements, some rows checked."""
    k, n, m = 2048, 2048, 1_100_000
    weight = random_weight(k, n, 128, device="cuda")
    a = random_rows(1000, k, device="cuda").repeat(m // 1000, 1)
    assert a.numel() > 2**31
    y = ops.matmul(a, weight.b, weight.s, config=config)
    expected = ops.matmul(a[:1000], weight.b, weight.s, config=config)
    for block in y.view(-1, 1000, n):  # other cuts of the line of tiles: other orders of the sums
        torch.testing.assert_close(block, expected, rtol=2e-3, atol=2e-2)
    k, n = 65536, 65536 + 64  # 4.3e9 weights
    b = torch.randint(-(2**31), 2**31, (k // 16, 2 * n), dtype=torch.int32, device="cuda")
    s = torch.rand(k // 128, n, device="cuda").half()
    a = random_rows(3, k, device="cuda")
    y = ops.matmul(a, b, s, config=config)
    tail = b.view(k // 16, n // 64, 128)[:, -1].contiguous()
    expected = ops.matmul(a, tail, s[:, -64:].contiguous(), config="reference")
    torch.testing.assert_close(y[:, -64:].float(), expected.float(), rtol=2e-3, atol=0.5)


def test_rows_further_apart_than_the_kernels_reach():
    """Chunks of 16 bytes are counted in 32 bits: what lies further off is refused."""
    pitch = 2**35
    if torch.cuda.mem_get_info()[0] < 2 * pitch + 2**30:
        pytest.skip("needs 65 GiB")
    a = torch.empty(pitch + 128, dtype=torch.half, device="cuda").as_strided((2, 128), (pitch, 1))
    weight = random_weight(128, 64, 64, device="cuda")
    with pytest.raises(RuntimeError, match=r"a: expected at most 68719476736 bytes from its first"):
        ops.matmul(a, weight.b, weight.s)


def test_graphs_give_their_counters_back():
    """More captures than there are slices of counters: slices come back with their graphs.

    A launch that gets no counters takes no memory for partial sums: that tells the two apart.
    """
    weight = random_weight(2048, 64, 128, device="cuda")
    a = random_rows(4, 2048, device="cuda")
    expected = ops.matmul(a, weight.b, weight.s, config="8x128x64x4@8")

    def allocations():
        return torch.cuda.memory_stats()["allocation.all.allocated"]

    stream = torch.cuda.Stream()
    for _ in range(5000):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):  # torch.cuda.graph would empty the allocator's cache
            graph.capture_begin()
            before = allocations()
            y = ops.matmul(a, weight.b, weight.s, config="8x128x64x4@8")
            taken = allocations() - before
            graph.capture_end()
        assert taken == 2  # Y and the partial sums
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, expected)
