"""Second moments: against the definition, however the tokens arrive."""

import pytest
import torch

from gptq import hessian as hessian_module
from gptq.hessian import Hessian


@pytest.mark.parametrize("at_once", [24, 9])  # rows: all of them, or some and a rest
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_mean_of_outer_products_over_all_tokens(dtype, device, at_once, monkeypatch):
    monkeypatch.setitem(hessian_module.ROWS_AT_ONCE, device, at_once)
    generator = torch.Generator().manual_seed(0)
    shapes = [(7,), (2, 5), (1, 3, 4)]
    batches = [torch.randn(*shape, 24, generator=generator).to(dtype) for shape in shapes]
    hessian = Hessian(24, device)
    for batch in batches:
        hessian.add(batch.to(device))
    tokens = torch.cat([batch.reshape(-1, 24) for batch in batches]).double()
    expected = sum(torch.outer(token, token) for token in tokens) / len(tokens)
    assert hessian.tokens == 29
    mean = hessian.mean()
    torch.testing.assert_close(mean.cpu().double(), expected, rtol=1e-5, atol=1e-6)
    if at_once < 24:
        assert torch.equal(mean, mean.T)


@pytest.mark.parametrize("at_once", [24, 9])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_energies_are_quadratic_forms(device, at_once, monkeypatch):
    monkeypatch.setitem(hessian_module.ROWS_AT_ONCE, device, at_once)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(30, 24, generator=generator, dtype=torch.float64)
    columns = torch.randn(24, 5, generator=generator, dtype=torch.float64)
    given = columns.to(device)
    found = hessian_module.energies((tokens.T @ tokens).to(device), given)
    torch.testing.assert_close(found.cpu(), (tokens @ columns).square().sum(dim=0))
    assert torch.equal(given.cpu(), columns)  # left as they were


def test_half_precision_inputs_are_summed_in_float32():
    inputs = torch.full((5000, 2), 1.0, dtype=torch.bfloat16)
    hessian = Hessian(2)
    hessian.add(inputs)  # 5000 is no BF16 number, and a BF16 sum of ones stops at 256
    assert hessian.sum.dtype == torch.float32
    assert hessian.sum[0, 1] == 5000


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("products", hessian_module.PRODUCTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_of_inputs_rounded_to_the_type_asked_for(products, dtype, device):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(200, 24, generator=generator).to(dtype)
    hessian = Hessian(24, device, products=products)
    hessian.add(inputs[:90].to(device))
    hessian.add(inputs[90:].to(device))
    rounded = inputs.to(hessian_module.PRODUCTS[products] or dtype).double()
    mean = hessian.mean()
    assert mean.dtype == torch.float32
    exact = rounded.T @ rounded / 200
    torch.testing.assert_close(mean.cpu().double(), exact, rtol=1e-5, atol=1e-6)
    if products == "float64":  # FP32 is where it ends, not where it was summed
        assert torch.equal(mean.cpu(), exact.float())
    if dtype == torch.float32 and products in ("float16", "bfloat16"):  # which can be told
        full = inputs.double().T @ inputs.double() / 200
        assert (mean.cpu() - full).abs().max() > 1e-5


def test_misuse_is_refused():
    with pytest.raises(ValueError, match=r"products: expected one of own, .*, got 'tf32'"):
        Hessian(4, products="tf32")
    with pytest.raises(ValueError, match="at least one token"):
        Hessian(4).mean()
    with pytest.raises(ValueError, match=r"expected \(..., 4\).*got \(3, 5\)"):
        Hessian(4).add(torch.zeros(3, 5))
