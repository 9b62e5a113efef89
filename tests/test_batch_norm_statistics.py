"""The arithmetic of exact batch norm, on its own: statistics merge to the whole's, the running ones take
in what torch's do, and the coefficients of the backward pass are its derivative.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from sbp_fast.invariance.statistics import (
    Moments,
    backward_coefficients,
    inverse_deviation,
    merge,
    running_statistics,
)

CHANNELS = 3
# Of sums over some hundred values, in float64.
CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def values(count: int, offset: float = 0.0) -> Tensor:
    """``(count, CHANNELS)``; every part of it has another mean."""
    drift = torch.linspace(-3, 3, count, dtype=torch.float64)[:, None]
    return torch.randn(count, CHANNELS, dtype=torch.float64) + drift + offset


def moments_of(x: Tensor) -> Moments:
    return Moments(len(x), x.mean(0), (x - x.mean(0)).square().sum(0))


def merged(parts: Sequence[Tensor]) -> Moments:
    return merge([moments_of(part) for part in parts])


def check_close(actual: Moments, expected: Moments) -> None:
    assert actual.count == expected.count
    torch.testing.assert_close(actual.mean, expected.mean, **CLOSE)
    torch.testing.assert_close(actual.m2, expected.m2, **CLOSE)


class TestMerge:
    @given(
        sizes=st.lists(st.integers(1, 40), min_size=1, max_size=8),
        offset=st.sampled_from([0.0, -5.0, 100.0]),
        seed=st.integers(0, 2**16),
    )
    def test_gives_the_statistics_of_the_whole(
        self, sizes: list[int], offset: float, seed: int
    ) -> None:
        torch.manual_seed(seed)
        x = values(sum(sizes), offset)
        check_close(merged(x.split(sizes)), moments_of(x))

    def test_order_does_not_matter(self) -> None:
        parts = values(30).split([3, 20, 7])
        check_close(merged(parts[::-1]), merged(parts))

    def test_far_from_zero_no_digit_is_lost(self) -> None:
        """Merging sums of squares would lose all of them here."""
        x = values(30)
        far = [part + 1e9 for part in x.split([3, 20, 7])]
        # What is left is how the values themselves are rounded, 1e-7 each.
        torch.testing.assert_close(merged(far).m2, moments_of(x).m2, rtol=1e-6, atol=0)


def test_running_statistics_take_in_what_torchs_do() -> None:
    """With a momentum of one, torch keeps nothing else."""
    x = values(30)
    mean, variance = torch.zeros(2, CHANNELS, dtype=torch.float64)
    functional.batch_norm(x, mean, variance, training=True, momentum=1.0)
    actual_mean, actual_variance = running_statistics(moments_of(x))
    torch.testing.assert_close(actual_mean, mean, **CLOSE)
    torch.testing.assert_close(actual_variance, variance, **CLOSE)


class TestBackwardCoefficients:
    @pytest.mark.parametrize("affine", [True, False], ids=["affine", "no_affine"])
    def test_are_the_derivative(self, affine: bool) -> None:
        """``dx = a * dy + b * (x - mean) + c``, as ``sbp_fast.ops.batch_norm_backward_apply`` has it."""
        eps = 1e-3
        x, dy = values(30).requires_grad_(), torch.randn(30, CHANNELS, dtype=torch.float64)
        weight = torch.rand(CHANNELS, dtype=torch.float64) + 0.5 if affine else None
        functional.batch_norm(x, None, None, weight, None, training=True, eps=eps).backward(dy)
        moments = moments_of(x.detach())
        inv_std = inverse_deviation(moments, eps)
        centred = x.detach() - moments.mean
        sums = torch.stack([dy.sum(0), (dy * centred * inv_std).sum(0)])
        mean, a, b, c = backward_coefficients(30, moments.mean, inv_std, weight, sums)
        assert torch.equal(mean, moments.mean)
        torch.testing.assert_close(a * dy + b * centred + c, x.grad, **CLOSE)
