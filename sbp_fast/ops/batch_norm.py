"""Batch norm in parts, so that its statistics may come from more samples than one call sees.

A layer normalises ``y = (x - mean) * inv_std * weight + bias`` with the mean and the variance of each
channel over the whole large batch. A micro-batch contributes ``(count, mean, M2)``, where ``M2`` is the
sum of squared distances from its mean; these merge without cancellation (Chan, Golub and LeVeque 1983,
"Algorithms for computing the sample variance"). Backward likewise needs two sums over the large batch,
after which every micro-batch's gradient is its own affair.

All coefficients and statistics are ``float64`` tensors with one column per channel; channels are
dimension 1 of the input. Kernels compute in the input's dtype, 16-bit inputs in float32, and sum in
float64. Where a mean is rounded to that dtype, the addend makes up for it: means far from zero cost no
accuracy.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backends import operator


def batch_norm_statistics(input: Tensor, *, backend: str = "auto") -> Tensor:
    """``mean`` and ``M2`` of each channel: shape ``(2, C)``, float64. Zeros where there is no sample.

    Args:
        input: shape ``(N, C, ...)``, float32, float64, bfloat16 or float16, any strides.
        backend: as in :func:`sbp_fast.ops.scale_accumulate_`.

    Raises:
        RuntimeError, ValueError, BackendUnavailableError: as :func:`sbp_fast.ops.scale_accumulate_`.
    """
    result: Tensor = _operator("batch_norm_statistics", backend, input)(input)
    return result


def batch_norm_normalise(input: Tensor, coefficients: Tensor, *, backend: str = "auto") -> Tensor:
    """``(input - mean) * scale + shift``, a new tensor of the input's dtype and strides.

    Args:
        input: as in :func:`batch_norm_statistics`.
        coefficients: rows ``mean``, ``scale`` (``inv_std * weight``), ``shift`` (``bias``); shape
            ``(3, C)``, float64.
    """
    result: Tensor = _operator("batch_norm_normalise", backend, input)(input, coefficients)
    return result


def batch_norm_backward_statistics(
    grad_output: Tensor, input: Tensor, coefficients: Tensor, *, backend: str = "auto"
) -> Tensor:
    """``sum(dy)`` and ``sum(dy * xhat)`` of each channel: shape ``(2, C)``, float64.

    ``xhat = (input - mean) * inv_std`` is computed here again, so that nobody needs to keep it.

    Args:
        grad_output: ``dy``, of the input's shape and dtype, any strides.
        input: as in :func:`batch_norm_statistics`.
        coefficients: rows ``mean``, ``inv_std``; shape ``(2, C)``, float64.
    """
    result: Tensor = _operator("batch_norm_backward_statistics", backend, input)(
        grad_output, input, coefficients
    )
    return result


def batch_norm_backward_apply(
    grad_output: Tensor, input: Tensor, coefficients: Tensor, *, backend: str = "auto"
) -> Tensor:
    """The gradient of the input: ``a * dy + b * (input - mean) + c``, of the input's dtype and strides.

    With the large batch's sums this is ``weight * inv_std * (dy - sum(dy) / N - xhat * sum(dy * xhat)
    / N)``, the derivative of batch norm (Ioffe and Szegedy 2015, section 3).

    Args:
        grad_output, input: as in :func:`batch_norm_backward_statistics`.
        coefficients: rows ``mean``, ``a``, ``b``, ``c``; shape ``(4, C)``, float64.
    """
    result: Tensor = _operator("batch_norm_backward_apply", backend, input)(
        grad_output, input, coefficients
    )
    return result


def _operator(name: str, backend: str, tensor: Tensor) -> torch._ops.OpOverload:
    return operator(name, backend, tensor.device.type)
