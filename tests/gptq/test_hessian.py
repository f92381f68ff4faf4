"""Second moments: against the definition, however the tokens arrive."""

import pytest
import torch

from gptq.hessian import Hessian


def test_mean_of_outer_products_over_all_tokens():
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(*shape, 24, generator=generator) for shape in [(7,), (2, 5), (1, 3, 4)]]
    hessian = Hessian(24)
    for batch in batches:
        hessian.add(batch)
    tokens = torch.cat([batch.reshape(-1, 24) for batch in batches]).double()
    expected = sum(torch.outer(token, token) for token in tokens) / len(tokens)
    assert hessian.tokens == 29
    torch.testing.assert_close(hessian.mean().double(), expected, rtol=1e-5, atol=1e-6)


def test_half_precision_inputs_are_summed_in_float32():
    inputs = torch.full((5000, 2), 1.0, dtype=torch.bfloat16)
    hessian = Hessian(2)
    hessian.add(inputs)  # 5000 is no BF16 number, and a BF16 sum of ones stops at 256
    assert hessian.sum.dtype == torch.float32
    assert hessian.sum[0, 1] == 5000


def test_misuse_is_refused():
    with pytest.raises(ValueError, match="at least one token"):
        Hessian(4).mean()
    with pytest.raises(ValueError, match=r"expected \(..., 4\).*got \(3, 5\)"):
        Hessian(4).add(torch.zeros(3, 5))
