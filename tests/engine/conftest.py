"""Tests of the CUDA engines: what this GPU, or this build, cannot run is skipped."""

import pytest
import torch

from marlin import host, ops


@pytest.fixture(autouse=True)
def engine_is_here(request):
    """The sm_90 engine needs a Hopper GPU and a build for it; selecting like another GPU, as much
    shared memory as that has."""
    params = getattr(request.node, "callspec", None)
    config = (params.params.get("config") or "") if params else ""
    if config.startswith("like:"):
        limit = torch.cuda.get_device_properties(0).shared_memory_per_block_optin
        if int(config.rpartition(":")[2]) > limit:
            pytest.skip("this GPU has less shared memory")
    shape = host.kernel_shapes().get(config.partition("@")[0])
    if shape is None or shape["engine"] != "sm90":
        return
    built = "9.0a" in ops.build_report().get("archs", "")
    if not built or torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("the sm_90 engine is not here")
