"""What the batch norm ops demand of their arguments, and the shapes they return."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import GRADIENT_DTYPES


def fake_statistics(input: Tensor) -> Tensor:
    _check_input("batch_norm_statistics", "input", input)
    return input.new_empty((2, input.shape[1]), dtype=torch.float64)


def fake_normalise(input: Tensor, coefficients: Tensor) -> Tensor:
    op = "batch_norm_normalise"
    _check_input(op, "input", input)
    _check_coefficients(op, coefficients, 3, input)
    return torch.empty_like(input)


def fake_backward_statistics(grad_output: Tensor, input: Tensor, coefficients: Tensor) -> Tensor:
    op = "batch_norm_backward_statistics"
    _check_pair(op, grad_output, input)
    _check_coefficients(op, coefficients, 2, input)
    return input.new_empty((2, input.shape[1]), dtype=torch.float64)


def fake_backward_apply(grad_output: Tensor, input: Tensor, coefficients: Tensor) -> Tensor:
    op = "batch_norm_backward_apply"
    _check_pair(op, grad_output, input)
    _check_coefficients(op, coefficients, 4, input)
    return torch.empty_like(input)


def _check_input(op: str, name: str, tensor: Tensor) -> None:
    _check_layout(op, name, tensor)
    if tensor.dtype not in GRADIENT_DTYPES:
        raise RuntimeError(
            f"{op}: {name} has dtype {tensor.dtype}; it must be one of "
            + ", ".join(str(dtype) for dtype in GRADIENT_DTYPES)
        )
    if tensor.ndim < 2:
        raise RuntimeError(
            f"{op}: {name} has shape {tuple(tensor.shape)}; it must have at least two dimensions, "
            "(samples, channels, ...)"
        )


def _check_layout(op: str, name: str, tensor: Tensor) -> None:
    if tensor.layout is not torch.strided:
        raise RuntimeError(
            f"{op}: {name} is not in the layout torch.strided; it must be dense, "
            "call .to_dense() on it first"
        )


def _check_pair(op: str, grad_output: Tensor, input: Tensor) -> None:
    _check_input(op, "grad_output", grad_output)
    _check_input(op, "input", input)
    if grad_output.shape != input.shape:
        raise RuntimeError(
            f"{op}: grad_output has shape {tuple(grad_output.shape)} but input has shape "
            f"{tuple(input.shape)}; the shapes must be equal"
        )
    for what in ("dtype", "device"):
        a, b = getattr(grad_output, what), getattr(input, what)
        if a != b:
            raise RuntimeError(
                f"{op}: grad_output has {what} {a} but input has {what} {b}; they must be equal"
            )


def _check_coefficients(op: str, coefficients: Tensor, rows: int, input: Tensor) -> None:
    _check_layout(op, "coefficients", coefficients)
    if coefficients.dtype != torch.float64 or coefficients.shape != (rows, input.shape[1]):
        raise RuntimeError(
            f"{op}: coefficients have dtype {coefficients.dtype} and shape "
            f"{tuple(coefficients.shape)}; they must be float64 of shape {(rows, input.shape[1])}, "
            "one column per channel"
        )
    if coefficients.device != input.device:
        raise RuntimeError(
            f"{op}: coefficients are on {coefficients.device} but input is on {input.device}; all "
            "tensors of a call must share one device"
        )
