"""The batch norm ops in plain PyTorch: their meaning, and the fallback where nothing faster exists."""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks_batch_norm as checks
from .schemas import library


def batch_norm_statistics(input: Tensor) -> Tensor:
    checks.fake_statistics(input)
    if input.numel() == 0:
        return input.new_zeros((2, input.shape[1]), dtype=torch.float64)
    dims = _all_but_channels(input)
    x = input.double()
    mean = x.mean(dims)
    return torch.stack([mean, (x - _column(mean, input)).square().sum(dims)])


def batch_norm_normalise(input: Tensor, coefficients: Tensor) -> Tensor:
    result = checks.fake_normalise(input, coefficients)
    mean, scale, shift = _columns(coefficients, input)
    return result.copy_((_wide(input) - mean) * scale + shift)


def batch_norm_backward_statistics(
    grad_output: Tensor, input: Tensor, coefficients: Tensor
) -> Tensor:
    checks.fake_backward_statistics(grad_output, input, coefficients)
    dims = _all_but_channels(input)
    mean, inv_std = (_column(row, input) for row in coefficients)
    dy = grad_output.double()
    return torch.stack([dy.sum(dims), (dy * ((input.double() - mean) * inv_std)).sum(dims)])


def batch_norm_backward_apply(grad_output: Tensor, input: Tensor, coefficients: Tensor) -> Tensor:
    result = checks.fake_backward_apply(grad_output, input, coefficients)
    mean, a, b, c = _columns(coefficients, input)
    return result.copy_(a * _wide(grad_output) + b * (_wide(input) - mean) + c)


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _all_but_channels(input: Tensor) -> list[int]:
    return [d for d in range(input.ndim) if d != 1]


def _column(row: Tensor, input: Tensor) -> Tensor:
    return row.reshape(-1, *[1] * (input.ndim - 2))


def _columns(coefficients: Tensor, input: Tensor) -> list[Tensor]:
    """The rows in the dtype that is computed in. What rounding takes from the mean, the first row, comes
    back with the last one: the last but one is the factor of ``x - mean``."""
    dtype = _wide(input).dtype
    mean, factor, addend = coefficients[0], coefficients[-2], coefficients[-1]
    correction = (mean.to(dtype) - mean) * factor
    addend = addend + correction.nan_to_num(0.0, posinf=0.0, neginf=0.0)
    return [_column(row.to(dtype), input) for row in (*coefficients[:-1], addend)]


for _function in (
    batch_norm_statistics,
    batch_norm_normalise,
    batch_norm_backward_statistics,
    batch_norm_backward_apply,
):
    library.impl(f"{_function.__name__}.reference", _function, "CompositeExplicitAutograd")
