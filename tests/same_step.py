"""Certifies that a split leaves the step of a zoo model as it is: loss, gradients, running statistics."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import pytest
import tolerances
import torch
from reference.full_batch import (
    FullBatch,
    Gradients,
    assert_close,
    buffers_of,
    full_batch,
    gradients_of,
    relative_errors,
    total_relative_error,
)
from reference.running_statistics import assert_buffers_match
from torch import nn
from zoo.case import SAMPLES, Builder, Case

from sbp_fast import StreamedAccumulator

UNEVEN = 5
# One sample at a time; 5 + 5 + 2; all at once.
SPLITS = pytest.mark.parametrize("micro_batch_size", [1, UNEVEN, SAMPLES])


def every(*builders: Builder) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("build", builders, ids=[build.__name__ for build in builders])


def check_same_step(
    build: Builder, dtype: torch.dtype, micro_batch_size: int, **options: Any
) -> None:
    """``backward`` leaves the gradient that the whole batch has, and the buffers that it leaves."""
    case = build().to(dtype)
    accumulator = accumulator_for(case, micro_batch_size, **options)
    result = accumulator.backward(case.inputs, case.targets)
    oracle, bounds = oracle_of(build), bounds_of(build, dtype)
    check_gradients(all_gradients(case), oracle, bounds)
    assert_close(result.loss, oracle.loss, bounds.total)
    assert_buffers_match(buffers_of(case.model), oracle.buffers, bounds.total)
    assert not result.skipped


def accumulator_for(case: Case, micro_batch_size: int, **options: Any) -> StreamedAccumulator:
    options.setdefault("normalization", case.normalization)
    return StreamedAccumulator(
        case.model,
        torch.optim.SGD(all_parameters(case), lr=0.1),
        case.loss_fn,
        micro_batch_size=micro_batch_size,
        **options,
    )


def all_parameters(case: Case) -> list[nn.Parameter]:
    of_loss = case.loss_fn.parameters() if isinstance(case.loss_fn, nn.Module) else ()
    return [*case.model.parameters(), *of_loss]


def all_gradients(case: Case) -> Gradients:
    """By name, those of a loss that is a module included."""
    of_loss = gradients_of(case.loss_fn) if isinstance(case.loss_fn, nn.Module) else {}
    return {**gradients_of(case.model), **_of_loss(of_loss)}


@functools.cache
def oracle_of(build: Builder) -> FullBatch:
    case = build()
    return full_batch(
        case.model if case.oracle is None else case.oracle, case.loss_fn, case.inputs, case.targets
    )


@dataclass(frozen=True)
class Bounds:
    """What the relative error of each parameter and of all together may be."""

    parameter: float
    total: float


@functools.cache
def bounds_of(build: Builder, dtype: torch.dtype) -> Bounds:
    """The promise; in float32, where the whole batch does not keep it itself, a multiple of its error."""
    step = tolerances.STEP[dtype]
    if dtype is torch.float64:
        return Bounds(step, step)
    # The whole batch at once in this dtype, in plain PyTorch.
    case, expected = build().to(dtype), expected_gradients(oracle_of(build))
    whole_loss(case).backward()
    actual = all_gradients(case)
    parameter = max(relative_errors(actual, expected).values())
    assert parameter <= tolerances.WHOLE_AT_MOST, (
        f"the whole batch itself is off by {parameter:.3e}"
    )
    return Bounds(
        max(step, tolerances.AS_WHOLE * parameter),
        max(step, tolerances.AS_WHOLE * total_relative_error(actual, expected)),
    )


def whole_loss(case: Case) -> torch.Tensor:
    as_keywords = isinstance(case.inputs, dict)
    outputs = case.model(**case.inputs) if as_keywords else case.model(case.inputs)
    return outputs["loss"] if case.loss_fn is None else case.loss_fn(outputs, case.targets)


def check_gradients(actual: Gradients, oracle: FullBatch, bounds: Bounds) -> None:
    expected = expected_gradients(oracle)
    for name, error in relative_errors(actual, expected).items():
        assert error <= bounds.parameter, f"{name}: {error:.3e}, bound {bounds.parameter:.1e}"
    error = total_relative_error(actual, expected)
    assert error <= bounds.total, f"total relative error {error:.3e}, bound {bounds.total:.1e}"


def expected_gradients(oracle: FullBatch) -> Gradients:
    return {**oracle.gradients, **_of_loss(oracle.loss_gradients)}


def _of_loss(gradients: Gradients) -> Gradients:
    return {f"loss_fn.{name}": gradient for name, gradient in gradients.items()}
