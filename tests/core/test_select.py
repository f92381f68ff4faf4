"""Selection is a pure function: what it says for GPUs that are not here."""

import itertools
import re
from pathlib import Path

import pytest

from marlin import host
from marlin.testing.shapes import GPUS, MODELS, ROWS


@pytest.mark.parametrize("gpu", [name for name in GPUS if name != "H200"])
def test_selected_shapes_fit(gpu):
    _, sm_count, shared_bytes = GPUS[gpu]
    shapes = host.kernel_shapes()
    layers = {layer for model in MODELS.values() for layer in model.values()}
    for (k, n), m, group in itertools.product(layers, (*ROWS[1:], 4096), (-1, 32, 64, 128)):
        name, runs = host.select(m, n, k, group, sm_count, shared_bytes).split("@")
        shape = shapes[name]
        assert shape["shared_bytes"] <= shared_bytes
        slices = -(-n // shape["columns"]) * -(-m // shape["rows"])
        assert 1 <= int(runs) <= slices * -(-k // shape["depth"])
        wide = host.select(m, n, k, group, sm_count, shared_bytes, bf16_scales=True).split("@")[0]
        assert shapes[wide]["shared_bytes"] <= shared_bytes
        assert group == -1 or shapes[wide]["scales_sums"]  # FP16 could not hold BF16's


LAYERS = sorted({layer for model in MODELS.values() for layer in model.values()})


@pytest.mark.parametrize("group", [-1, 32, 64, 128])
@pytest.mark.parametrize("sm_count", [132, 114, 78])  # H100 and H200 SXM, H100 PCIe, H20
def test_hopper_gets_its_own_engine(group, sm_count):
    """Tuned shapes and others, any batch: a configuration of the sm_90 engine that fits."""
    shapes = host.kernel_shapes()
    others = [(64, 64), (1024, 192), (6144, 16384), (100352, 128), (256, 131072)]
    for (k, n), m in itertools.product([*LAYERS, *others], (*ROWS[1:], 2048, 100_000)):
        if k < group:
            continue
        name, runs = host.select(m, n, k, group, sm_count, GPUS["H200"][2], major=9).split("@")
        shape = shapes[name]
        assert shape["engine"] == "sm90" and shape["shared_bytes"] <= GPUS["H200"][2]
        slices = -(-n // shape["columns"]) * -(-m // shape["rows"])
        assert 1 <= int(runs) <= slices * -(-k // shape["depth"])


@pytest.mark.parametrize("sm_count", [1, 2, 3, 15, 131])
def test_runs_fit_any_number_of_sms(sm_count):
    """Twins take two each, so on one SM there are none."""
    taken = set()
    for n, m, k in itertools.product((5120, 9728, 14336), (256, 1000, 9000), (4096, 65536)):
        name, runs = host.select(m, n, k, 128, sm_count, GPUS["H200"][2], major=9).split("@")
        twins = host.kernel_shapes()[name]["twins"]
        assert 1 <= int(runs) <= sm_count // twins
        taken.add(twins)
    assert sm_count != 131 or 2 in taken


TABLE = Path(__file__).resolve().parents[2] / "csrc/dispatch/sm90_table.def"


def test_tuned_shapes_run_as_they_were_measured():
    """The table's first row of a large layer, and the batch sizes below it."""
    shape, runs = re.search(
        r'^\{16384, 16896, 8, "(\w+)", (\d+)\}', TABLE.read_text(), re.M
    ).groups()
    for m in (1, 3, 8):
        name = host.select(m, 16896, 16384, 128, 132, GPUS["H200"][2], major=9)
        assert name == f"{shape}@{runs}"


def test_every_row_of_the_table_is_selected():
    """The first row of a problem that is not the net, which FP16 rows do not take by themselves: it
    does not hold every scale. BF16 rows take the first."""
    rows = re.findall(r'^\{(\d+), (\d+), (\d+), "(\w+)", (\d+)\}', TABLE.read_text(), re.MULTILINE)
    first, engine = {}, {}
    for k, n, m, name, runs in rows:
        problem = (int(m), int(n), int(k), 128, 132, GPUS["H200"][2], 9)
        first.setdefault(problem, f"{name}@{runs}")
        if name != "dense":
            engine.setdefault(problem, f"{name}@{runs}")
    for problem in first:
        assert host.select(*problem) == engine[problem]
        assert host.select(*problem, bf16_rows=True) == first[problem]
        assert not host.select(*problem, bf16_scales=True).startswith("dense")
    assert len(first) > 200 and any(name.startswith("dense") for name in first.values())


@pytest.mark.parametrize("shared_bytes", [99 * 1024, 163 * 1024, GPUS["H200"][2]])
@pytest.mark.parametrize("sm_count", [132, 114, 72])
def test_what_was_not_measured_takes_what_should_cost_least(shared_bytes, sm_count):
    """Of every shape that fits, in even splits or stripes; without a table measured layers, too."""
    engine, major = ("sm90", 9) if shared_bytes == GPUS["H200"][2] else ("sm80", 8)
    row = r'^\{"(\w+)", ([\d.]+), ([\d.]+), ([\d.]+), ([\d.]+)\}'
    text = TABLE.with_name(f"{engine}_costs.def").read_text()
    costs = {name: tuple(map(float, us)) for name, *us in re.findall(row, text, re.M)}
    shapes = {n: s for n, s in host.kernel_shapes().items() if s["engine"] == engine}
    assert set(costs) == set(shapes)

    def us(name, runs, m, n, k):
        shape = shapes[name]
        slices = -(-n // shape["columns"]) * -(-m // shape["rows"])
        work = host.busiest_run(slices, -(-k // shape["depth"]), runs)
        launch, tile, segment, sharer = costs[name]
        return launch + tile * work[0] + segment * work[1] + sharer * (work[2] - 1)

    layers = [(6144, 6144), (2048, 8192), (7168, 18432), (1024, 64)]
    if (engine, sm_count) != ("sm90", 132):
        layers.append((4096, 4096))
    for (k, n), m in itertools.product(layers, (1, 50, 256, 1500, 9000)):
        chosen, runs = host.select(m, n, k, 128, sm_count, shared_bytes, major).split("@")
        assert shapes[chosen]["shared_bytes"] <= shared_bytes
        least = us(chosen, int(runs), m, n, k)
        for name, shape in shapes.items():
            most = max(1, sm_count // shape["twins"])
            slices = -(-n // shape["columns"]) * -(-m // shape["rows"])
            most = min(most, slices * -(-k // shape["depth"]))
            for candidate in {most, *(slices * split for split in (1, 2, 4))}:
                if shape["shared_bytes"] <= shared_bytes and candidate <= most:
                    assert least <= us(name, candidate, m, n, k) + 1e-9, (name, candidate)


def test_where_scales_must_multiply_sums_both_engines_shapes_compete():
    """FP16 rows and BF16 scales on Hopper: its own shapes for few rows or small weights (4096x1024,
    64 rows: 5.8 us, the other engine's best 8.1), never those that scale weights."""
    shapes, engines = host.kernel_shapes(), {}
    layers = [(4096, 1024), (3584, 3584), (4096, 4096), (8192, 28672)]
    for (k, n), m in itertools.product(layers, (1, 16, 32, 64, 256, 4096)):
        args = (m, n, k, 128, 132, GPUS["H200"][2], 9)
        shape = shapes[host.select(*args, bf16_scales=True).split("@")[0]]
        assert shape["scales_sums"]
        assert host.select(*args, bf16_scales=True, bf16_rows=True) == host.select(
            *args, bf16_rows=True
        )
        engines[k, n, m] = shape["engine"]
    assert engines[4096, 1024, 64] == engines[3584, 3584, 32] == engines[8192, 28672, 1] == "sm90"
    assert engines[8192, 28672, 256] == engines[4096, 4096, 4096] == "sm80"


def test_measured_shapes_that_do_not_fit_are_not_taken():
    """A Hopper GPU with as many SMs as the one that was measured, and less shared memory."""
    shapes = host.kernel_shapes()
    for m in (1, 64, 512, 4096):
        needed = [
            shapes[host.select(m, 4096, 4096, 128, 132, limit, 9).split("@")[0]]["shared_bytes"]
            for limit in (GPUS["H200"][2], 120 * 1024)
        ]
        assert needed[0] > 120 * 1024 >= needed[1]


def test_names_say_the_shape():
    for name, shape in host.kernel_shapes().items():
        said = tuple(map(int, name.lstrip("h").split("x")))
        assert name.startswith("h") == (shape["engine"] == "sm90")
        assert said[:3] == tuple(shape[part] for part in ("rows", "columns", "depth"))
        assert shape["threads"] <= 640 and shape["twins"] == (2 if name.startswith("hh") else 1)


def test_which_shapes_add_over_distributed_shared_memory():
    """All of the sm_90 engine but twins, which are a cluster already, and 48 rows, whose half is no
    multiple of 16. (Whether CTAs pair cannot be told from a result.)"""
    shapes = host.kernel_shapes()
    alone = {name for name, shape in shapes.items() if not shape["can_pair"]}
    sm80 = {name for name, shape in shapes.items() if shape["engine"] == "sm80"}
    assert alone - sm80 == {"hh256x256x64x4", "h48x256x128x2", "h48x128x128x2"}
