"""The method, mutated: each mistake makes the comparison with the whole batch fail.

Mutants replace functions of ``sbp_fast.invariance.statistics``, which are called as attributes of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from same_step import UNEVEN, check_same_step, every
from torch import Tensor
from zoo import convolutional, norm_graphs, norm_layers
from zoo.case import Builder

from sbp_fast.invariance import statistics

Function = Callable[..., Any]
SEVERAL = every(norm_layers.plain, norm_graphs.used_twice, convolutional.residual)


def frozen_statistics(original: Function) -> Function:
    """Uses the large batch's mean and variance, but as constants: no gradient passes through them."""

    def backward_coefficients(
        mean: Tensor, inv_std: Tensor, weight: Tensor | None, sums: Tensor, count: Tensor
    ) -> Any:
        return original(mean, inv_std, weight, torch.zeros_like(sums), count)

    return backward_coefficients


def constant_mean(original: Function) -> Function:
    def backward_coefficients(
        mean: Tensor, inv_std: Tensor, weight: Tensor | None, sums: Tensor, count: Tensor
    ) -> Any:
        through_variance = torch.stack([torch.zeros_like(sums[0]), sums[1]])
        return original(mean, inv_std, weight, through_variance, count)

    return backward_coefficients


def constant_variance(original: Function) -> Function:
    def backward_coefficients(
        mean: Tensor, inv_std: Tensor, weight: Tensor | None, sums: Tensor, count: Tensor
    ) -> Any:
        through_mean = torch.stack([sums[0], torch.zeros_like(sums[1])])
        return original(mean, inv_std, weight, through_mean, count)

    return backward_coefficients


def mean_of_means_and_variances(original: Function) -> Function:
    """Averages over micro-batches, as if they were equally large and had one mean."""

    def merge(counts: Tensor, means: Tensor, m2s: Tensor) -> Any:
        count = counts.sum()
        return count, means.mean(0), (m2s / counts[:, None]).mean(0) * count

    return merge


def equally_large(original: Function) -> Function:
    """Forgets that the last micro-batch is smaller."""

    def merge(counts: Tensor, means: Tensor, m2s: Tensor) -> Any:
        return original(torch.full_like(counts, float(counts.mean())), means, m2s)

    return merge


def variance_within_only(original: Function) -> Function:
    """Forgets that the means of micro-batches differ."""

    def merge(counts: Tensor, means: Tensor, m2s: Tensor) -> Any:
        count, mean, _ = original(counts, means, m2s)
        return count, mean, m2s.sum(0)

    return merge


def biased_running_variance(original: Function) -> Function:
    """Divides by the count where torch divides by one less."""

    def running_statistics(
        running_mean: Tensor,
        running_var: Tensor,
        count: Tensor,
        mean: Tensor,
        m2: Tensor,
        momentum: float,
    ) -> Any:
        biased = m2 * (count - 1) / count
        return original(running_mean, running_var, count, mean, biased, momentum)

    return running_statistics


def momentum_of_the_old(original: Function) -> Function:
    """The momentum of running statistics is the new one's part, not the old one's."""

    def running_statistics(
        running_mean: Tensor,
        running_var: Tensor,
        count: Tensor,
        mean: Tensor,
        m2: Tensor,
        momentum: float,
    ) -> Any:
        return original(running_mean, running_var, count, mean, m2, 1 - momentum)

    return running_statistics


MUTANTS = [
    ("backward_coefficients", frozen_statistics),
    ("backward_coefficients", constant_mean),
    ("backward_coefficients", constant_variance),
    ("merge", mean_of_means_and_variances),
    ("merge", equally_large),
    ("merge", variance_within_only),
    ("running_statistics", biased_running_variance),
    ("running_statistics", momentum_of_the_old),
]


def mutate(
    monkeypatch: pytest.MonkeyPatch, name: str, mutation: Callable[[Function], Function]
) -> list[str]:
    """Puts a mutant in the place of a function; returns a list that grows with every call of it."""
    mutant, calls = mutation(getattr(statistics, name)), []

    def counted(*args: Any) -> Any:
        calls.append(name)
        return mutant(*args)

    monkeypatch.setattr(statistics, name, counted)
    return calls


@SEVERAL
@pytest.mark.parametrize(("name", "mutation"), MUTANTS, ids=[m.__name__ for _, m in MUTANTS])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_mutant_is_caught(
    monkeypatch: pytest.MonkeyPatch,
    build: Builder,
    name: str,
    mutation: Callable[[Function], Function],
    dtype: torch.dtype,
) -> None:
    calls = mutate(monkeypatch, name, mutation)
    with pytest.raises(AssertionError, match=r"error|bound"):
        check_same_step(build, dtype, UNEVEN, batch_norm="exact")
    assert calls


@SEVERAL
@pytest.mark.parametrize("name", ["backward_coefficients", "merge", "running_statistics"])
def test_nothing_is_caught_where_nothing_is_mutated(
    monkeypatch: pytest.MonkeyPatch, build: Builder, name: str
) -> None:
    calls = mutate(monkeypatch, name, lambda original: original)
    check_same_step(build, torch.float64, UNEVEN, batch_norm="exact")
    assert calls
