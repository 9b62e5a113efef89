"""The picture of device memory over time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .extra import import_extra
from .plot import BUDGET_COLOR, MEBIBYTE, PLAIN_COLOR, SBP_COLOR


def save_timeline_figure(
    path: Path, points: Sequence[tuple[float, int]], budget: int | None
) -> None:
    """Writes the figure. Raises ImportError, naming the extra, where matplotlib is not installed."""
    # A figure of its own, not pyplot's: no display and no global state.
    figure = import_extra("matplotlib.figure").Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots()
    seconds = [at for at, _ in points]
    sizes = [size / MEBIBYTE for _, size in points]
    axes.fill_between(seconds, sizes, step="post", color=SBP_COLOR, alpha=0.25, lw=0)
    axes.step(seconds, sizes, where="post", color=SBP_COLOR, lw=0.8)
    peak = max(range(len(points)), key=lambda position: sizes[position])
    axes.plot(seconds[peak], sizes[peak], "o", color=PLAIN_COLOR, ms=4)
    axes.annotate(
        f"peak {sizes[peak]:.1f} MiB",
        (seconds[peak], sizes[peak]),
        xytext=(6, 4),
        textcoords="offset points",
        fontsize=9,
        color=PLAIN_COLOR,
    )
    highest = sizes[peak]
    if budget is not None:
        highest = max(highest, budget / MEBIBYTE)
        axes.axhline(budget / MEBIBYTE, color=BUDGET_COLOR, ls="--", lw=1)
        axes.annotate(
            "budget",
            (1, budget / MEBIBYTE),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="bottom",
            fontsize=9,
            color=BUDGET_COLOR,
        )
    axes.set_ylim(0, 1.15 * max(highest, 1e-6))
    axes.set_xlim(seconds[0], seconds[-1] if seconds[-1] > seconds[0] else seconds[0] + 1e-3)
    axes.set_xlabel("seconds")
    axes.set_ylabel("device memory, MiB")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
