"""The ops in plain PyTorch: the meaning that every other backend is tested against, and the fallback
on devices for which nothing faster exists."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import checks
from .schemas import library


def scale_accumulate_(
    accumulators: Sequence[Tensor],
    gradients: Sequence[Tensor],
    scale: float,
    first_write: bool = False,
    statistics: Tensor | None = None,
) -> None:
    checks.check_scale_accumulate(accumulators, gradients, scale, first_write, statistics)
    checks.check_separate("scale_accumulate_", "accumulators", accumulators, "gradients", gradients)
    for accumulator, gradient in zip(accumulators, gradients, strict=True):
        contribution = gradient.to(accumulator.dtype) * scale
        if first_write:
            accumulator.copy_(contribution)
        else:
            accumulator.add_(contribution)
        if statistics is not None:
            _add_statistics(statistics, gradient, accumulator)


def gradient_statistics_(gradients: Sequence[Tensor], statistics: Tensor) -> None:
    checks.check_gradient_statistics(gradients, statistics)
    for gradient in gradients:
        _add_statistics(statistics, gradient, gradient)


def finalise_(
    outputs: Sequence[Tensor],
    accumulators: Sequence[Tensor],
    scale: Tensor,
    norm: Tensor | None = None,
    max_norm: float | None = None,
) -> None:
    checks.check_finalise(outputs, accumulators, scale, norm, max_norm)
    checks.check_separate("finalise_", "outputs", outputs, "accumulators", accumulators)
    coefficient = scale
    if norm is not None and max_norm is not None:
        coefficient = scale * (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for output, accumulator in zip(outputs, accumulators, strict=True):
        output.copy_(accumulator * coefficient.to(accumulator.dtype))


def _add_statistics(statistics: Tensor, incoming: Tensor, result: Tensor) -> None:
    statistics[0] += incoming.double().square().sum()
    statistics[1] += result.double().square().sum()
    statistics[2] = torch.maximum(statistics[2], (~result.isfinite()).any().double())


for _name, _function in {
    "scale_accumulate_": scale_accumulate_,
    "gradient_statistics_": gradient_statistics_,
    "finalise_": finalise_,
}.items():
    library.impl(f"{_name}.reference", _function, "CompositeExplicitAutograd")
