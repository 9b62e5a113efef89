"""The arithmetic of batch norm over several micro-batches: pure functions on float64, one column per
channel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """``count`` values per channel, their ``mean``, and ``m2``, the sum of squared distances from it."""

    count: int
    mean: Tensor
    m2: Tensor


def merge(parts: Sequence[Moments]) -> Moments:
    """The moments of all parts together.

    Pairwise update of Chan, Golub and LeVeque (1983, "Algorithms for computing the sample variance",
    equation 2.1) for any number of parts. No squares of large means are subtracted from one another.
    """
    if len(parts) == 1:
        return parts[0]
    counts = torch.tensor([part.count for part in parts], dtype=torch.float64)
    counts = counts.to(parts[0].mean.device, non_blocking=True)[:, None]
    means = torch.stack([part.mean for part in parts])
    total = sum(part.count for part in parts)
    mean = (means * counts).sum(0) / total
    between = ((means - mean).square() * counts).sum(0)
    return Moments(total, mean, torch.stack([part.m2 for part in parts]).sum(0) + between)


def inverse_deviation(moments: Moments, eps: float) -> Tensor:
    """``1 / sqrt(variance + eps)``, the variance being the biased one, that which normalises."""
    return (moments.m2 / moments.count + eps).rsqrt()


def running_statistics(moments: Moments) -> tuple[Tensor, Tensor]:
    """What running statistics take in: the mean, and the unbiased variance ``m2 / (count - 1)``."""
    return moments.mean, moments.m2 / (moments.count - 1)


def forward_coefficients(
    mean: Tensor, inv_std: Tensor, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    """Rows ``mean``, ``scale``, ``shift`` for :func:`sbp_fast.ops.batch_norm_normalise`."""
    scale = inv_std if weight is None else inv_std * weight.detach()
    shift = torch.zeros_like(mean) if bias is None else bias.detach().double()
    return torch.stack([mean, scale, shift])


def backward_coefficients(
    count: int, mean: Tensor, inv_std: Tensor, weight: Tensor | None, sums: Tensor
) -> Tensor:
    """Rows ``mean``, ``a``, ``b``, ``c`` for :func:`sbp_fast.ops.batch_norm_backward_apply`.

    ``dx = weight * inv_std * (dy - sum(dy) / N - xhat * sum(dy * xhat) / N)``, with both sums over the
    whole large batch: the mean and the variance pass gradients on, too.

    Args:
        sums: rows ``sum(dy)``, ``sum(dy * xhat)``.
    """
    a = inv_std if weight is None else inv_std * weight.detach()
    over_count = a / count
    return torch.stack([mean, a, -over_count * inv_std * sums[1], -over_count * sums[0]])
