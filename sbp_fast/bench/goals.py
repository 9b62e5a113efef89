"""What was promised of these figures, and whether a set of rows keeps it.

The promises hold for the CPU kernels on two cores and for the full sizes: a quick run says little.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from .rows import Row


@dataclass(frozen=True)
class Goal:
    """A bound on one figure of all rows that match; the worst of them counts, or their average.

    Attributes:
        benchmark, case, contender, opponent: what a row must begin with, or for ``opponent`` be.
        figure: the row's attribute.
        at_least, at_most: the bound; one of them is given.
        on_average: the geometric mean counts: where each figure's spread is wider than what is asked.
    """

    text: str
    benchmark: str
    case: str = ""
    contender: str = "sbp_fast cpu"
    opponent: str = ""
    figure: str = "ratio_median"
    at_least: float | None = None
    at_most: float | None = None
    on_average: bool = False

    def value(self, rows: Sequence[Row]) -> float | None:
        """The figure that counts; None where no row has it."""
        values = [
            getattr(row, self.figure)
            for row in rows
            if row.benchmark == self.benchmark
            and row.case.startswith(self.case)
            and row.contender.startswith(self.contender)
            and (not self.opponent or row.ratio_to == self.opponent)
        ]
        if not values:
            return None
        if self.on_average:
            return statistics.geometric_mean(values)
        worst: float = min(values) if self.at_least is not None else max(values)
        return worst

    def is_met_by(self, value: float) -> bool:
        if self.at_least is not None:
            return value >= self.at_least
        return self.at_most is None or value <= self.at_most


_STATISTICS = "sbp_fast cpu + statistics"

GOALS = (
    Goal(
        "bf16 into fp32, statistics on: at least 4 times torch._foreach_add_",
        "accumulate", "bf16", _STATISTICS, "torch._foreach_add_", at_least=4.0,
    ),
    Goal(
        "bf16 into fp32, statistics on: at least 0.90 of the ceiling",
        "accumulate", "bf16", _STATISTICS, "STREAM update", at_least=0.90,
    ),
    Goal(
        "fp32, statistics on: at least 0.92 of the ceiling",
        "accumulate", "fp32", _STATISTICS, "STREAM update", at_least=0.92,
    ),
    Goal(
        "fp32: never slower than torch._foreach_add_",
        "accumulate", "fp32", opponent="torch._foreach_add_", at_least=1.0,
    ),
    Goal(
        "first write: at least 2 times faster than zero + add",
        "first write", opponent="torch zero + add", at_least=2.0,
    ),
    Goal(
        "overhead: at most 0.25 us per tensor",
        "overhead", "161", figure="us_per_tensor", at_most=0.25,
    ),
    Goal(
        "step: at most 1.02 times the plain loop, at every micro-batch size",
        "step", contender="StreamedAccumulator", opponent="plain loop", at_most=1.02,
    ),
    Goal(
        "step: the same on average over batches and micro-batch sizes",
        "step", contender="StreamedAccumulator", opponent="plain loop", at_most=1.02,
        on_average=True,
    ),
    Goal(
        "dropout per sample: at most 1.10 times torch's time",
        "dropout", opponent="torch dropout", at_most=1.10,
    ),
    Goal(
        "exact batch norm, micro-batch 8: at most 1.35 times the plain loop's time",
        "exact", "ResNet-50 fp32, 64 px, batch 64, micro-batch 8", "batch_norm='exact'",
        "plain loop", at_most=1.35,
    ),
)  # fmt: skip


def report(rows: Sequence[Row]) -> str:
    """A line per goal that ``rows`` say something about; empty if they are silent on all."""
    lines = []
    for goal in GOALS:
        value = goal.value(rows)
        if value is not None:
            verdict = "met   " if goal.is_met_by(value) else "MISSED"
            lines.append(f"{verdict}  {value:6.3f}  {goal.text}")
    return "\n".join(lines)
