"""The method, mutated: each mistake makes the comparison with the whole batch fail.

Mutants replace functions of ``sbp_fast.invariance.statistics``, which are called as attributes of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from same_step import UNEVEN, check_same_step, every
from torch import Tensor
from zoo import convolutional, norm_graphs, norm_layers
from zoo.case import Builder

from sbp_fast.invariance import statistics
from sbp_fast.invariance.statistics import Moments

Function = Callable[..., Any]
SEVERAL = every(norm_layers.plain, norm_graphs.used_twice, convolutional.residual)


def frozen_statistics(original: Function) -> Function:
    """Uses the large batch's mean and variance, but as constants: no gradient passes through them."""

    def backward_coefficients(
        count: int, mean: Tensor, inv_std: Tensor, weight: Tensor | None, sums: Tensor
    ) -> Tensor:
        return original(count, mean, inv_std, weight, torch.zeros_like(sums))

    return backward_coefficients


def constant_mean(original: Function) -> Function:
    def backward_coefficients(
        count: int, mean: Tensor, inv_std: Tensor, weight: Tensor | None, sums: Tensor
    ) -> Tensor:
        through_variance = torch.stack([torch.zeros_like(sums[0]), sums[1]])
        return original(count, mean, inv_std, weight, through_variance)

    return backward_coefficients


def constant_variance(original: Function) -> Function:
    def backward_coefficients(
        count: int, mean: Tensor, inv_std: Tensor, weight: Tensor | None, sums: Tensor
    ) -> Tensor:
        through_mean = torch.stack([sums[0], torch.zeros_like(sums[1])])
        return original(count, mean, inv_std, weight, through_mean)

    return backward_coefficients


def mean_of_means_and_variances(original: Function) -> Function:
    """Averages over micro-batches, as if they were equally large and had one mean."""

    def merge(parts: Sequence[Moments]) -> Moments:
        count = sum(part.count for part in parts)
        mean = torch.stack([part.mean for part in parts]).mean(0)
        variance = torch.stack([part.m2 / part.count for part in parts]).mean(0)
        return Moments(count, mean, variance * count)

    return merge


def unweighted_mean(original: Function) -> Function:
    """Forgets that the last micro-batch is smaller."""

    def merge(parts: Sequence[Moments]) -> Moments:
        mean = torch.stack([part.mean for part in parts]).mean(0)
        return replace(original(parts), mean=mean)

    return merge


def variance_within_only(original: Function) -> Function:
    """Forgets that the means of micro-batches differ."""

    def merge(parts: Sequence[Moments]) -> Moments:
        return replace(original(parts), m2=torch.stack([part.m2 for part in parts]).sum(0))

    return merge


def biased_running_variance(original: Function) -> Function:
    """Divides by the count where torch divides by one less."""

    def running_statistics(moments: Moments) -> tuple[Tensor, Tensor]:
        return moments.mean, moments.m2 / moments.count

    return running_statistics


MUTANTS = [
    ("backward_coefficients", frozen_statistics),
    ("backward_coefficients", constant_mean),
    ("backward_coefficients", constant_variance),
    ("merge", mean_of_means_and_variances),
    ("merge", unweighted_mean),
    ("merge", variance_within_only),
    ("running_statistics", biased_running_variance),
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
