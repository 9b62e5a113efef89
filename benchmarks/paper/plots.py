"""Accuracy, time and memory against the batch size, a panel for each model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sbp_fast.report.plot import BUDGET_COLOR, MEBIBYTE, PLAIN_COLOR, SBP_COLOR

from .extra import import_bench
from .figures import Figures, trained
from .models import MODELS, SEGMENTATION
from .profiles import Profile
from .published import TABLES
from .results import Row
from .ways import PLAIN, SBP, TRUTH, WITHOUT

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# The truth lies below what should match it, and is wider, so that both are seen.
_STYLES: dict[str, dict[str, Any]] = {
    TRUTH: {"color": "#b8c2c9", "linewidth": 6, "marker": "o", "markersize": 9},
    PLAIN: {"color": PLAIN_COLOR, "linewidth": 1.5, "marker": "s"},
    WITHOUT: {"color": BUDGET_COLOR, "linewidth": 0, "marker": "x", "markersize": 9},
    SBP: {"color": SBP_COLOR, "linewidth": 1.5, "marker": "o"},
}
# A figure and half the width of its interval; None where it failed.
_Point = tuple[float, float] | None
_COLUMNS = 4


def draw(profile: Profile, rows: Sequence[Row], folder: Path) -> list[Path]:
    """Writes three PNG files and returns them. Raises ImportError where matplotlib is not installed."""
    kinds: tuple[tuple[str, str, Callable[[Figures], _Point]], ...] = (
        ("accuracy", "accuracy (%)", _percent),
        ("time", "time per sample (ms)", _time),
        ("memory", "peak device memory (MiB)", _memory),
    )
    return [_draw(profile, rows, folder / f"{name}.png", label, at) for name, label, at in kinds]


def _percent(figures: Figures) -> _Point:
    if figures.percent is None:
        return None
    margin = figures.percent.margin if figures.percent.count > 1 else 0.0
    return figures.percent.mean, margin


def _time(figures: Figures) -> _Point:
    if figures.sample_ms is None:
        return None
    return figures.sample_ms.mean, figures.sample_ms.margin if figures.sample_ms.count > 1 else 0.0


def _memory(figures: Figures) -> _Point:
    return None if figures.peak_bytes is None else (figures.peak_bytes / MEBIBYTE, 0.0)


def _draw(
    profile: Profile,
    rows: Sequence[Row],
    path: Path,
    label: str,
    at: Callable[[Figures], _Point],
) -> Path:
    models = [training.model for training in profile.trainings]
    lines = -(-len(models) // _COLUMNS)
    columns = min(len(models), _COLUMNS)
    # A figure of its own, not pyplot's: no display and no global state.
    figure = import_bench("matplotlib.figure", "matplotlib").Figure(
        figsize=(3.4 * columns, 3.1 * lines + 0.6), layout="constrained"
    )
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    for panel in panels[len(models) :]:
        panel.set_visible(False)
    for model, axes in zip(models, panels, strict=False):
        _draw_model(axes, profile, rows, model, at)
        if at is _memory:
            axes.axhline(
                profile.budget_bytes[-1] / MEBIBYTE,
                color=BUDGET_COLOR,
                linestyle="--",
                linewidth=1,
                label="budget",
            )
            axes.set_yscale("log")
        iou = at is _percent and MODELS[model].task == SEGMENTATION
        axes.set_ylabel("mean IoU (%)" if iou else label)
    # One legend for all: panels without the paper's figures have fewer entries.
    entries = {
        text: handle
        for panel in panels[: len(models)]
        for handle, text in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        entries.values(), entries.keys(), loc="outside lower center", ncols=3, frameon=False
    )
    figure.savefig(path, dpi=110)
    return path


def _draw_model(
    axes: Axes,
    profile: Profile,
    rows: Sequence[Row],
    model: str,
    at: Callable[[Figures], _Point],
) -> None:
    for way, style in _STYLES.items():
        points = [
            (batch, *point)
            for batch in sorted(profile.batches)
            if (point := at(trained(rows, model, batch, way))) is not None
        ]
        if points:
            batches, values, margins = zip(*points, strict=True)
            axes.errorbar(batches, values, margins, label=way, capsize=3, **style)
    if at is _percent and model in TABLES:
        published = TABLES[model][1]
        printed = [batch for batch in sorted(profile.batches) if batch in published]
        axes.plot(
            printed,
            [published[batch].sbp_percent for batch in printed],
            color=SBP_COLOR,
            linestyle=":",
            linewidth=1,
            label="SBP, the paper's",
        )
    axes.set_title(model, fontsize=10)
    axes.set_xscale("log", base=2)
    axes.set_xticks(profile.batches, list(map(str, profile.batches)))
    axes.minorticks_off()
    axes.set_xlabel("large batch (samples)")
    axes.spines[["top", "right"]].set_visible(False)
