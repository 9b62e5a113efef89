"""The arithmetic of exact batch norm, on its own: statistics merge to the whole's, the running ones move
as torch's do, and the coefficients of the backward pass are its derivative.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from sbp_fast.invariance.statistics import backward_coefficients, merge, running_statistics

CHANNELS = 3
# Of sums over some hundred values, in float64.
CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def values(count: int, offset: float = 0.0) -> Tensor:
    """``(count, CHANNELS)``; every part of it has another mean."""
    drift = torch.linspace(-3, 3, count, dtype=torch.float64)[:, None]
    return torch.randn(count, CHANNELS, dtype=torch.float64) + drift + offset


def statistics_of(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    count = torch.tensor(float(len(x)), dtype=torch.float64)
    return count, x.mean(0), (x - x.mean(0)).square().sum(0)


def merged(parts: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    counts, means, m2s = zip(*map(statistics_of, parts), strict=True)
    return merge(torch.stack(counts), torch.stack(means), torch.stack(m2s))


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
        for actual, expected in zip(merged(list(x.split(sizes))), statistics_of(x), strict=True):
            torch.testing.assert_close(actual, expected, **CLOSE)

    def test_order_does_not_matter(self) -> None:
        parts = list(values(30).split([3, 20, 7]))
        for a, b in zip(merged(parts), merged(parts[::-1]), strict=True):
            torch.testing.assert_close(a, b, **CLOSE)

    def test_far_from_zero_no_digit_is_lost(self) -> None:
        """Merging sums of squares would lose all of them here."""
        x = values(30)
        far = [part + 1e9 for part in x.split([3, 20, 7])]
        # What is left is how the values themselves are rounded, 1e-7 each.
        torch.testing.assert_close(merged(far)[2], statistics_of(x)[2], rtol=1e-6, atol=0)


class TestRunningStatistics:
    @pytest.mark.parametrize("momentum", [0.0, 0.1, 1.0])
    def test_move_as_torch_moves_them(self, momentum: float) -> None:
        x = values(30)
        mean, variance = torch.randn(CHANNELS).double(), torch.rand(CHANNELS).double() + 0.5
        expected_mean, expected_variance = mean.clone(), variance.clone()
        functional.batch_norm(x, expected_mean, expected_variance, training=True, momentum=momentum)
        before = mean.clone(), variance.clone()
        actual_mean, actual_variance = running_statistics(
            mean, variance, *statistics_of(x), momentum
        )
        torch.testing.assert_close(actual_mean, expected_mean, **CLOSE)
        torch.testing.assert_close(actual_variance, expected_variance, **CLOSE)
        assert torch.equal(mean, before[0])
        assert torch.equal(variance, before[1])


class TestBackwardCoefficients:
    @pytest.mark.parametrize("affine", [True, False], ids=["affine", "no_affine"])
    def test_are_the_derivative(self, affine: bool) -> None:
        """``dx = a * dy + b * (x - mean) + c``, as ``sbp_fast.ops.batch_norm_backward_apply`` has it."""
        eps = 1e-3
        x, dy = values(30).requires_grad_(), torch.randn(30, CHANNELS, dtype=torch.float64)
        weight = torch.rand(CHANNELS, dtype=torch.float64) + 0.5 if affine else None
        functional.batch_norm(x, None, None, weight, None, training=True, eps=eps).backward(dy)
        count, mean, m2 = statistics_of(x.detach())
        inv_std = (m2 / count + eps).rsqrt()
        centred = x.detach() - mean
        sums = torch.stack([dy.sum(0), (dy * centred * inv_std).sum(0)])
        returned_mean, a, b, c = backward_coefficients(mean, inv_std, weight, sums, count)
        assert torch.equal(returned_mean, mean)
        torch.testing.assert_close(a * dy + b * centred + c, x.grad, **CLOSE)
