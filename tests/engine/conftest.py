"""Tests of the CUDA engines."""

import pytest
import torch

from marlin import host, ops


@pytest.fixture(autouse=True)
def engine_is_here(request):
    """The sm_90 engine needs a Hopper GPU and a build for it."""
    params = getattr(request.node, "callspec", None)
    config = (params.params.get("config") or "") if params else ""
    shape = host.kernel_shapes().get(config.partition("@")[0])
    if shape is None or shape["engine"] != "sm90":
        return
    built = "9.0a" in ops.build_report().get("archs", "")
    if not built or torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("the sm_90 engine is not here")
