"""What a solution loses, by definition."""

import torch


def output_loss(weight, solution, hessian) -> float:
    """Share of the output's energy, in float64 and from codes and scales alone."""
    weight, hessian = weight.double(), hessian.double()
    error = weight - solution.dequantize().double()
    energy = torch.trace(weight.T @ hessian @ weight)
    return (torch.trace(error.T @ hessian @ error) / energy).item()
