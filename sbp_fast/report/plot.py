"""The demo's figure: peak memory against the budget, and the training curve."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .extra import import_extra

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PLAIN_COLOR = "#b5532a"
SBP_COLOR = "#1f6f8b"
BUDGET_COLOR = "#333333"
MEBIBYTE = 2**20


@dataclass(frozen=True)
class MemoryBar:
    """One way to do the step: its name and its peak memory in bytes."""

    name: str
    peak_bytes: int


@dataclass(frozen=True)
class TrainingCurve:
    """One loss for each step; test accuracies (0..1) after the steps in ``accuracy_steps``."""

    losses: Sequence[float]
    accuracy_steps: Sequence[int]
    accuracies: Sequence[float]


def save_figure(
    path: Path, title: str, bars: Sequence[MemoryBar], budget_bytes: int, curve: TrainingCurve
) -> None:
    """Writes a PNG. Raises ImportError, naming the extra, where matplotlib is not installed."""
    # A figure of its own, not pyplot's: no display and no global state.
    figure = import_extra("matplotlib.figure").Figure(figsize=(11, 4.2), layout="constrained")
    figure.suptitle(title)
    memory_axes, curve_axes = figure.subplots(1, 2, width_ratios=(1, 1.3))
    draw_memory(memory_axes, bars, budget_bytes)
    draw_curve(curve_axes, curve)
    figure.savefig(path, dpi=150, format="png")


def draw_memory(axes: Axes, bars: Sequence[MemoryBar], budget_bytes: int) -> None:
    """Bars of peak memory in MiB; those above the line of the budget in another colour."""
    budget = budget_bytes / MEBIBYTE
    heights = [bar.peak_bytes / MEBIBYTE for bar in bars]
    colors = [PLAIN_COLOR if height > budget else SBP_COLOR for height in heights]
    drawn = axes.bar([bar.name for bar in bars], heights, width=0.55, color=colors)
    axes.bar_label(
        drawn,
        labels=[
            f"{height:.0f} MiB" + ("\nout of memory" if height > budget else "")
            for height in heights
        ],
        padding=3,
    )
    axes.axhline(budget, color=BUDGET_COLOR, linestyle="--", linewidth=1.2)
    # Right of the bars, where no bar and no bar's label can be.
    axes.set_xlim(-0.5, len(bars) + 0.15)
    axes.annotate(
        f"budget\n{budget:.0f} MiB",
        (len(bars) + 0.15, budget),
        xytext=(-4, 4),
        textcoords="offset points",
        ha="right",
        va="bottom",
        color=BUDGET_COLOR,
    )
    axes.set_ylim(0, 1.2 * max(*heights, budget))
    axes.set_ylabel("peak memory of a step (MiB)")
    axes.spines[["top", "right"]].set_visible(False)


def draw_curve(axes: Axes, curve: TrainingCurve) -> None:
    """Training loss (left axis) and test accuracy in percent (right axis) over steps."""
    steps = range(1, len(curve.losses) + 1)
    (loss_line,) = axes.plot(steps, curve.losses, color=PLAIN_COLOR, label="training loss")
    axes.set_xlabel("step")
    axes.set_ylabel("training loss", color=PLAIN_COLOR)
    axes.set_ylim(0, 1.05 * max(curve.losses))
    axes.spines[["top"]].set_visible(False)
    accuracy_axes = axes.twinx()
    (accuracy_line,) = accuracy_axes.plot(
        curve.accuracy_steps,
        [100 * accuracy for accuracy in curve.accuracies],
        color=SBP_COLOR,
        marker="o",
        label="test accuracy",
    )
    accuracy_axes.set_ylabel("test accuracy (%)", color=SBP_COLOR)
    accuracy_axes.set_ylim(0, 105)
    accuracy_axes.spines[["top"]].set_visible(False)
    axes.legend(handles=[loss_line, accuracy_line], loc="center right", frameon=False)
