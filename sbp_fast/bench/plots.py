"""Draws results from their rows."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from .growth import Growth
from .rows import Row
from .step import OURS

_GOAL_STEP = 1.02


class PlottingUnavailableError(RuntimeError):
    """matplotlib is not installed. The message says how to get it."""


def draw_bandwidth(rows: Sequence[Row], path: Path) -> None:
    """Bars of the bandwidth that each contender reaches, a panel per case.

    Raises:
        PlottingUnavailableError: there is no matplotlib.
        ValueError: no row counts bytes.
    """
    cases = _group([row for row in rows if row.bytes])
    if not cases:
        raise ValueError("no row counts bytes; draw the rows of the kernel cases")
    plt = _pyplot()
    heights = [0.6 + 0.3 * len(bars) for bars in cases.values()]
    figure, panels = plt.subplots(
        len(cases), 1, figsize=(8, sum(heights)), height_ratios=heights, squeeze=False,
        layout="constrained", sharex=True,
    )  # fmt: skip
    for panel, (name, bars) in zip(panels[:, 0], cases.items(), strict=True):
        names = list(bars)[::-1]
        for contender in names:
            row = bars[contender]
            typical, fastest, slowest = (
                row.bytes / milliseconds / 1e6
                for milliseconds in (row.median_ms, row.min_ms, row.max_ms)
            )
            panel.barh(
                contender, typical, height=0.7, color=_color(contender),
                xerr=[[typical - slowest], [fastest - typical]],
                error_kw={"lw": 0.8, "capsize": 2, "ecolor": "0.35"},
            )  # fmt: skip
        panel.set_title(name, fontsize=9, loc="left")
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    panels[-1, 0].set_xlabel("GB/s: bytes that the task needs over the median time; lines: range")
    figure.suptitle(rows[0].device, fontsize=10)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_step(rows: Sequence[Row], path: Path) -> None:
    """The step's time over the plain loop's against the micro-batch size.

    Raises:
        PlottingUnavailableError: there is no matplotlib.
        ValueError: there is no row of the step.
    """
    lines: dict[str, list[tuple[int, Row]]] = {}
    for row in rows:
        match = re.fullmatch(r"(.*), micro-batch (\d+)", row.case)
        if match and row.contender == OURS and row.ratio_median is not None:
            lines.setdefault(match[1], []).append((int(match[2]), row))
    if not lines:
        raise ValueError(f"no row compares {OURS}; draw the rows of the step cases")
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(9, 4.5), layout="constrained")
    for position, (label, points) in enumerate(lines.items()):
        points.sort(key=lambda point: point[0])
        # Lines of one size beside one another, so that their spreads can be told apart.
        sizes = [size * (1 + 0.03 * position) for size, _ in points]
        medians = [row.ratio_median or 0.0 for _, row in points]
        below = [
            median - (row.ratio_min or 0.0)
            for median, (_, row) in zip(medians, points, strict=True)
        ]
        above = [
            (row.ratio_max or 0.0) - median
            for median, (_, row) in zip(medians, points, strict=True)
        ]
        axes.errorbar(sizes, medians, [below, above], marker="o", capsize=3, lw=1, label=label)
    ticks = sorted({size for points in lines.values() for size, _ in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(size) for size in ticks])
    axes.axhline(1.0, color="0.5", lw=0.8)
    axes.axhline(_GOAL_STEP, color="0.5", lw=0.8, ls="--")
    axes.annotate("goal", (0.995, _GOAL_STEP), xycoords=("axes fraction", "data"), ha="right")
    axes.set_xlabel("micro-batch size, samples")
    axes.set_ylabel("time of a step / of the plain loop")
    axes.set_title(rows[0].device, fontsize=10)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_growth(rows: Sequence[Growth], path: Path) -> None:
    """Time per sample, and the peak of device memory, against the large batch.

    Raises:
        PlottingUnavailableError: there is no matplotlib.
    """
    plt = _pyplot()
    figure, panels = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    batches = [row.batch for row in rows]
    for panel, values, label in (
        (panels[0], [row.ms_per_sample for row in rows], "ms per sample"),
        (panels[1], [row.device_bytes / 2**20 for row in rows], "peak of device memory, MiB"),
    ):
        panel.plot(batches, values, marker="o", lw=1)
        panel.set_xscale("log", base=2)
        panel.set_xticks(batches, [str(batch) for batch in batches])
        panel.set_ylim(0, 1.2 * max(values))
        panel.set_xlabel("large batch, samples")
        panel.set_ylabel(label)
    figure.suptitle(rows[0].case, fontsize=10)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _group(rows: Sequence[Row]) -> dict[str, dict[str, Row]]:
    """Case -> contender -> its first row: further ones differ in the opponent alone."""
    cases: dict[str, dict[str, Row]] = {}
    for row in rows:
        cases.setdefault(row.case, {}).setdefault(row.contender, row)
    return cases


def _color(contender: str) -> str:
    if contender.startswith("sbp_fast"):
        return "tab:blue"
    return "tab:orange" if contender.startswith("STREAM") else "0.6"


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise PlottingUnavailableError(
            f"matplotlib cannot be imported ({error}); pip install 'sbp_fast[demo]'"
        ) from error
    matplotlib.use("agg")
    import matplotlib.pyplot

    plt: ModuleType = matplotlib.pyplot
    return plt
