"""What a batch size costs in steps and in samples, from the gradient noise scale."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..report.table import format_table
from .noise_scale import NoiseScale

# Beside the current batch size, as multiples of it.
_MULTIPLES = (0.25, 0.5, 2.0, 4.0, 8.0, 16.0)


@dataclass(frozen=True)
class BatchSizeCost:
    """Training with batches of one size, against the same training with other sizes.

    Attributes:
        batch_size: in samples.
        steps: how many times the fewest steps that any batch size needs.
        samples: how many times the fewest samples that any batch size needs.
        steps_saved: the part of the steps that the current batch size needs; below 0 for more steps.
        steps_saved_interval: where ``steps_saved`` is if the noise scale is where it is expected.
    """

    batch_size: int
    steps: float
    samples: float
    steps_saved: float
    steps_saved_interval: tuple[float, float]


@dataclass(frozen=True)
class Advice:
    """How large a batch is worth its while; printed, a table.

    Attributes:
        critical_batch_size: in samples: it needs twice the fewest steps and twice the fewest samples.
        interval: where the critical batch size is expected.
        current: the batch size that savings are against.
        costs: by batch size.
    """

    critical_batch_size: float
    interval: tuple[float, float]
    current: int
    costs: tuple[BatchSizeCost, ...]

    def __str__(self) -> str:
        low, high = (_samples(bound) for bound in self.interval)
        rows = [
            [
                f"{cost.batch_size}{' (now)' if cost.batch_size == self.current else ''}",
                f"{cost.steps:.2f}",
                f"{cost.samples:.2f}",
                f"{cost.steps_saved:.0%}",
                "{:.0%} to {:.0%}".format(*cost.steps_saved_interval),
            ]
            for cost in self.costs
        ]
        header = ["batch size", "steps / fewest", "samples / fewest", "steps saved", "interval"]
        return (
            f"critical batch size: {_samples(self.critical_batch_size)} samples ({low} to {high})\n\n"
            + format_table(header, rows)
        )


def advise(
    noise_scale: NoiseScale | float, current: int, batch_sizes: Sequence[int] | None = None
) -> Advice:
    """Steps and samples of each batch size, at a learning rate that suits it.

    With the noise scale ``n``, batches of ``B`` samples need ``1 + n / B`` times the fewest steps and
    ``1 + B / n`` times the fewest samples: McCandlish et al. 2018, arXiv 1812.06162, section 2.
    That takes the noise scale for constant, and the curvature for alike in all directions. The noise
    scale grows as the loss falls: measure it where training spends its time.

    Args:
        noise_scale: as in ``result.noise_scale``; or a number of samples, which is taken for certain.
        current: the batch size that savings are against, in samples.
        batch_sizes: in samples; None for a quarter to sixteen times ``current``.

    Raises:
        ValueError: a size below 1, or a noise scale that is no number of at least 0.
    """
    if batch_sizes is None:
        batch_sizes = [current, *(max(1, round(current * factor)) for factor in _MULTIPLES)]
    for size in (current, *batch_sizes):
        if size < 1:
            raise ValueError(f"a batch size is {size}; it must be at least 1, a number of samples")
    if isinstance(noise_scale, NoiseScale):
        value, interval = noise_scale.value, noise_scale.interval()
    else:
        value, interval = noise_scale, (noise_scale, noise_scale)
    if not value >= 0:
        raise ValueError(
            f"the noise scale is {value}; it must be a number of samples, at least 0 (it is NaN before "
            "the first step that counts)"
        )
    return Advice(
        value,
        interval,
        current,
        tuple(_cost(size, value, interval, current) for size in sorted(set(batch_sizes))),
    )


def _cost(
    size: int, noise_scale: float, interval: tuple[float, float], current: int
) -> BatchSizeCost:
    saved, *bounds = (_steps_saved(size, current, n) for n in (noise_scale, *interval))
    return BatchSizeCost(
        batch_size=size,
        steps=1.0 + noise_scale / size,
        samples=1.0 + size / noise_scale if noise_scale else math.inf,
        steps_saved=saved,
        steps_saved_interval=(min(bounds), max(bounds)),
    )


def _steps_saved(size: int, current: int, noise_scale: float) -> float:
    if math.isinf(noise_scale):
        return 1.0 - current / size
    return 1.0 - (1.0 + noise_scale / size) / (1.0 + noise_scale / current)


def _samples(number: float) -> str:
    return "unbounded" if math.isinf(number) else f"{number:.3g}"
