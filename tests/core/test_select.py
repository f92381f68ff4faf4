"""Selection is a pure function: what it says for GPUs that are not here."""

import itertools

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


def test_names_say_the_shape():
    for name, shape in host.kernel_shapes().items():
        said = tuple(map(int, name.split("x")))
        assert said == tuple(shape[part] for part in ("rows", "columns", "depth", "depth_groups"))
        assert shape["threads"] <= 512
