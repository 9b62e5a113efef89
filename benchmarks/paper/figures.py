"""What the tables and plots show: the cells of one model, summarised over the seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .results import FAILED, Row
from .summary import Summary, summarise
from .ways import SBP, TRUTH


@dataclass(frozen=True)
class Figures:
    """One way with one large batch, over the seeds.

    Attributes:
        failed: memory ran out, with every seed; all else is None then.
        percent: accuracy or mean IoU.
        step_ms, sample_ms: over the seeds, of each seed's median.
        peak_bytes, host_bytes: the largest.
        gradient_difference: of the seed with which it was measured.
    """

    failed: bool
    percent: Summary | None = None
    step_ms: Summary | None = None
    sample_ms: Summary | None = None
    peak_bytes: int | None = None
    host_bytes: int | None = None
    gradient_difference: float | None = None


def trained(rows: Sequence[Row], model: str, batch: int, way: str) -> Figures:
    """Of the trainings."""
    return _figures([row for row in _chosen(rows, model, batch, way) if row.trained])


def probed(rows: Sequence[Row], model: str, batch: int, way: str, budget: int) -> Figures:
    """Of whatever was done under this budget (bytes)."""
    return _figures([row for row in _chosen(rows, model, batch, way) if row.budget == budget])


def difference_from_truth(
    rows: Sequence[Row], model: str, batch: int, way: str = SBP
) -> Summary | None:
    """Of the percentages, seed by seed: the way's less the truth's. None where either failed."""
    percents = [
        {
            row.seed: row.percent
            for row in _chosen(rows, model, batch, one)
            if row.trained and row.percent is not None
        }
        for one in (way, TRUTH)
    ]
    seeds = sorted(percents[0].keys() & percents[1].keys())
    return summarise([percents[0][seed] - percents[1][seed] for seed in seeds]) if seeds else None


def _chosen(rows: Sequence[Row], model: str, batch: int, way: str) -> list[Row]:
    return [row for row in rows if (row.model, row.batch, row.way) == (model, batch, way)]


def _figures(rows: Sequence[Row]) -> Figures:
    finished = [row for row in rows if row.outcome != FAILED]
    if not finished:
        return Figures(failed=True)

    def summary(name: str) -> Summary | None:
        values = [value for row in finished if (value := getattr(row, name)) is not None]
        return summarise(values) if values else None

    def largest(name: str) -> int | None:
        return max((getattr(row, name) for row in finished), default=None)

    differences = [row.gradient_difference for row in finished]
    return Figures(
        failed=False,
        percent=summary("percent"),
        step_ms=summary("step_ms"),
        sample_ms=summary("sample_ms"),
        peak_bytes=largest("peak_bytes"),
        host_bytes=largest("host_bytes"),
        gradient_difference=next((d for d in differences if d is not None), None),
    )
