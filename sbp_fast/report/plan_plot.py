"""A plan's figure: peak memory against the micro-batch size for each policy, and the budget."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .extra import import_extra
from .plot import BUDGET_COLOR, PLAIN_COLOR, SBP_COLOR

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ..planning import Plan

OTHER_COLOR = "#6a4c93"
# From the bottom: what is there for every size first.
PARTS = (
    ("parameters", "#8c9aa5"),
    ("optimizer", "#b8c2c9"),
    ("gradients", "#d9c7a3"),
    ("activations", SBP_COLOR),
    ("transient", PLAIN_COLOR),
)
# Of the policies that are not the chosen one.
LINES = ("-", ":", "-.")
MOST_BUDGETS = 3
UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))


def save_plan_figure(path: Path, plan: Plan) -> None:
    """Writes the figure. Raises ImportError, naming the extra, where matplotlib is not installed."""
    # A figure of its own, not pyplot's: no display and no global state.
    figure = import_extra("matplotlib.figure").Figure(figsize=(7.5, 4.6), layout="constrained")
    chosen = plan.chosen
    figure.suptitle(
        f"Batch {plan.batch_size} on {plan.device}: {chosen.micro_batches} micro-batches of "
        f"{chosen.micro_batch_size}, activations: {chosen.policy}",
        x=0.01,
        ha="left",
        fontsize=11,
    )
    axes = figure.subplots()
    draw_peaks(axes, plan)
    figure.legend(loc="outside right center", frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)


def draw_peaks(axes: Axes, plan: Plan) -> None:
    """Over micro-batch sizes (log): the chosen policy's peak in its parts, those of the other policies as
    lines, the budget and the choice."""
    rows = [row for row in plan.rows if row.policy == plan.policy]
    sizes = [row.micro_batch_size for row in rows]
    highest = max(plan.budget, *(row.peak.device_bytes for row in rows))
    unit, scale = next((pair for pair in UNITS if plan.budget >= pair[1]), UNITS[-1])
    axes.stackplot(
        sizes,
        [[getattr(row.peak, part) / scale for row in rows] for part, _ in PARTS],
        labels=[part for part, _ in PARTS],
        colors=[color for _, color in PARTS],
        linewidth=0,
    )
    others = dict.fromkeys(row.policy for row in plan.rows if row.policy != plan.policy)
    for policy, line in zip(others, LINES, strict=False):
        peaks = [row.peak.device_bytes / scale for row in plan.rows if row.policy == policy]
        axes.plot(sizes, peaks, color=OTHER_COLOR, linestyle=line, linewidth=1.6, label=policy)
    axes.axhline(
        plan.budget / scale, color=BUDGET_COLOR, linestyle="--", linewidth=1.2, label="budget"
    )
    axes.plot(
        [plan.micro_batch_size],
        [plan.chosen.peak.device_bytes / scale],
        color=BUDGET_COLOR,
        marker="o",
        linestyle="none",
        label="chosen",
        clip_on=False,
        zorder=3,
    )
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, list(map(str, sizes)), rotation=90 if len(sizes) > 9 else 0, fontsize=8)
    axes.minorticks_off()
    if len(sizes) > 1:
        axes.set_xlim(sizes[0], sizes[-1])
    # Sizes far beyond the budget leave through the top: what is near it is to be seen.
    axes.set_ylim(0, min(1.05 * highest, MOST_BUDGETS * plan.budget) / scale)
    axes.set_xlabel("micro-batch size (samples)")
    axes.set_ylabel(f"peak memory of a step ({unit})")
    axes.spines[["top", "right"]].set_visible(False)
