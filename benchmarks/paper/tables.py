"""The paper's tables 2 to 5, done again: per model accuracy, time and memory, gradients, budgets."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sbp_fast.memory import format_bytes

from .figures import Figures, difference_from_truth, probed, trained
from .models import MODELS, SEGMENTATION
from .profiles import Profile
from .published import TABLES, Published
from .results import Row
from .summary import Summary
from .ways import PLAIN, SBP, WAYS, WITHOUT

_F = "F"
_NOT_KNOWN = "-"


@dataclass(frozen=True)
class Table:
    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def tables_of(profile: Profile, rows: Sequence[Row], model: str) -> list[Table]:
    return [
        _percents(profile, rows, model),
        _times(profile, rows, model),
        _gradients(profile, rows, model),
        _budgets(profile, rows, model),
    ]


def _percents(profile: Profile, rows: Sequence[Row], model: str) -> Table:
    metric = "Mean IoU" if MODELS[model].task == SEGMENTATION else "Accuracy"
    lines = []
    for batch in profile.batches:
        line = [
            str(batch),
            *_published(model, batch, lambda it: (it.without_percent, it.sbp_percent)),
        ]
        line += [_percent(trained(rows, model, batch, way)) for way in WAYS]
        line += [
            _difference(difference_from_truth(rows, model, batch, way)) for way in (SBP, PLAIN)
        ]
        lines.append(tuple(line))
    return Table(
        f"{model}: {metric} (%), mean ± standard deviation [95% confidence interval]",
        (
            "batch",
            *_paper_columns(model),
            *WAYS,
            f"{SBP} less full batch",
            f"{PLAIN} less full batch",
        ),
        tuple(lines),
    )


def _times(profile: Profile, rows: Sequence[Row], model: str) -> Table:
    lines = []
    for batch in profile.batches:
        line = [str(batch), *_published(model, batch, lambda it: (it.without_ms, it.sbp_ms))]
        for way in WAYS:
            cell = trained(rows, model, batch, way)
            if cell.failed or cell.step_ms is None or cell.sample_ms is None:
                line.append(_F)
                continue
            waits = f" + {format_bytes(cell.host_bytes)} waiting" if cell.host_bytes else ""
            line.append(
                f"{cell.step_ms.mean:.0f} ± {cell.step_ms.deviation:.0f}; "
                f"{cell.sample_ms.mean:.3f}; {format_bytes(cell.peak_bytes or 0)}{waits}"
            )
        lines.append(tuple(line))
    return Table(
        f"{model}: time per step (ms, mean ± standard deviation); per sample (ms); peak memory",
        ("batch", *_paper_columns(model), *WAYS),
        tuple(lines),
    )


def _paper_columns(model: str) -> tuple[str, ...]:
    if model not in TABLES:
        return ()
    number, _ = TABLES[model]
    return (f"paper's table {number}, WSBP", f"paper's table {number}, SBP")


def _published(
    model: str, batch: int, pair: Callable[[Published], tuple[float | None, float | None]]
) -> list[str]:
    """What the paper has under these columns; nothing where it has no such table."""
    if model not in TABLES:
        return []
    figures = TABLES[model][1].get(batch)
    return [_NOT_KNOWN] * 2 if figures is None else [_plain(value) for value in pair(figures)]


def _gradients(profile: Profile, rows: Sequence[Row], model: str) -> Table:
    return Table(
        f"{model}: the first step's gradient, relative difference from the full batch's, in float64",
        ("batch", "micro-batch", SBP, PLAIN),
        tuple(
            (
                str(batch),
                _micro_batch(rows, model, batch),
                *(
                    _scientific(trained(rows, model, batch, way).gradient_difference)
                    for way in (SBP, PLAIN)
                ),
            )
            for batch in profile.batches
        ),
    )


def _budgets(profile: Profile, rows: Sequence[Row], model: str) -> Table:
    return Table(
        f"{model}: time per step (ms) and peak memory under each budget",
        ("batch", *(f"{way}, {budget}" for budget in profile.budgets for way in (WITHOUT, SBP))),
        tuple(
            (
                str(batch),
                *(
                    _probe(probed(rows, model, batch, way, budget))
                    for budget in profile.budget_bytes
                    for way in (WITHOUT, SBP)
                ),
            )
            for batch in profile.batches
        ),
    )


def agreement(profile: Profile, rows: Sequence[Row]) -> list[str]:
    """A line per model: in how many batch sizes SBP's result is the full batch's within noise, and its
    gradient's largest difference."""
    lines = []
    for training in profile.trainings:
        model = training.model
        within, compared = 0, 0
        for batch in profile.batches:
            difference = difference_from_truth(rows, model, batch)
            if difference is not None:
                compared += 1
                within += difference.low <= 0 <= difference.high
        largest = {
            way: max(
                (
                    value
                    for batch in profile.batches
                    if (value := trained(rows, model, batch, way).gradient_difference) is not None
                ),
                default=None,
            )
            for way in (SBP, PLAIN)
        }
        lines.append(
            f"{model}: within noise of the full batch (the 95% interval of the difference holds 0) for "
            f"{within} of {compared} batch sizes; largest gradient difference "
            f"{_scientific(largest[SBP])} with {SBP}, {_scientific(largest[PLAIN])} with {PLAIN}"
        )
    return lines


def _micro_batch(rows: Sequence[Row], model: str, batch: int) -> str:
    sizes = {
        row.micro_batch
        for row in rows
        if (row.model, row.batch, row.way) == (model, batch, SBP) and row.trained
    }
    return ", ".join(str(size) if size else _NOT_KNOWN for size in sorted(sizes))


def _percent(figures: Figures) -> str:
    return _F if figures.failed or figures.percent is None else _with_interval(figures.percent)


def _difference(summary: Summary | None) -> str:
    return _NOT_KNOWN if summary is None else _with_interval(summary, sign="+")


def _with_interval(summary: Summary, sign: str = "") -> str:
    text = f"{summary.mean:{sign}.1f} ± {summary.deviation:.1f}"
    if math.isinf(summary.margin):
        return text
    return f"{text} [{summary.low:{sign}.1f}, {summary.high:{sign}.1f}]"


def _probe(figures: Figures) -> str:
    if figures.failed or figures.step_ms is None:
        return _F
    return f"{figures.step_ms.mean:.0f}; {format_bytes(figures.peak_bytes or 0)}"


def _plain(value: float | None) -> str:
    return _F if value is None else f"{value:g}"


def _scientific(value: float | None) -> str:
    return _NOT_KNOWN if value is None else f"{value:.1e}"
