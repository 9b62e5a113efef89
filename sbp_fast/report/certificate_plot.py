"""The certificate's figure: errors layer by layer, sbp_fast's and plain accumulation's."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

from .extra import import_extra
from .plot import BUDGET_COLOR, PLAIN_COLOR, SBP_COLOR

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ..certificate import Certificate, ParameterError

# More names than these cannot be read side by side.
MOST_NAMES = 45
INCHES_PER_NAME = 0.16
MARKERS = "osD^vP"


def save_certificate_figure(path: Path, certificate: Certificate) -> None:
    """Writes the figure. Raises ImportError, naming the extra, where matplotlib is not installed."""
    names = min(len(_layers(certificate)), MOST_NAMES)
    # A figure of its own, not pyplot's: no display and no global state.
    figure = import_extra("matplotlib.figure").Figure(
        figsize=(7.5 + INCHES_PER_NAME * names, 5.2), layout="constrained"
    )
    figure.suptitle(_title(certificate), x=0.01, ha="left", fontsize=11)
    axes = figure.subplots()
    draw_errors(axes, certificate)
    figure.legend(loc="outside right center", frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)


def draw_errors(axes: Axes, certificate: Certificate) -> None:
    """Lines of relative error (log) over layers in the model's order, one for each micro-batch size.

    Where there is no gradient, or none that is finite, a point is on the upper edge, and where the error
    is 0 on the lower one. Both are labelled.
    """
    layers = _layers(certificate)
    curves = [
        (who, color, size, _worst_by_layer(certificate, layers, size, error))
        for who, color, error in (
            ("plain", PLAIN_COLOR, lambda row: row.plain_error),
            ("sbp_fast", SBP_COLOR, lambda row: row.error),
        )
        for size in (total.micro_batch_size for total in certificate.totals)
    ]
    tolerances = _worst_by_layer(
        certificate, layers, certificate.totals[0].micro_batch_size, lambda row: row.tolerance
    )
    lowest, highest = _edges([*tolerances, *(error for *_, curve in curves for error in curve)])
    positions = range(len(layers))
    sizes = len(certificate.totals)
    for (who, color, size, curve), marker in zip(curves, cycle(MARKERS[:sizes]), strict=False):
        # Hollow around filled: where both are the same, both are seen.
        is_plain = color == PLAIN_COLOR
        axes.plot(
            positions,
            [min(max(error, lowest), highest) for error in curve],
            color=color,
            marker=marker,
            markersize=8 if is_plain else 4,
            markerfacecolor="none" if is_plain else color,
            linewidth=1.0,
            clip_on=False,
            label=f"{who}, micro-batch {size}",
        )
    axes.plot(
        positions,
        tolerances,
        color=BUDGET_COLOR,
        linestyle="--",
        linewidth=1.2,
        drawstyle="steps-mid",
        label="tolerance",
    )
    axes.set_yscale("log")
    axes.set_ylim(lowest, highest)
    axes.set_xlabel("layer")
    axes.set_ylabel("relative error of the gradient")
    axes.set_xlim(-0.5, len(layers) - 0.5)
    every = math.ceil(len(layers) / MOST_NAMES)
    axes.set_xticks(positions[::every], layers[::every], rotation=90, fontsize=8)
    for edge, text, is_there in (
        (highest, "no finite gradient", any(max(c) > highest for *_, c in curves)),
        (lowest, "no difference", any(min(c) < lowest for *_, c in curves)),
    ):
        if is_there:
            axes.annotate(
                text,
                (1.01, edge),
                xycoords=("axes fraction", "data"),
                va="center",
                fontsize=8,
                color=BUDGET_COLOR,
            )
    axes.grid(axis="y", linewidth=0.4, alpha=0.5)
    axes.spines[["top", "right"]].set_visible(False)


def _layers(certificate: Certificate) -> list[str]:
    return list(dict.fromkeys(row.layer for row in certificate.rows))


def _worst_by_layer(
    certificate: Certificate,
    layers: list[str],
    micro_batch_size: int,
    error: Callable[[ParameterError], float],
) -> list[float]:
    worst = dict.fromkeys(layers, 0.0)
    for row in certificate.rows:
        if row.micro_batch_size == micro_batch_size:
            worst[row.layer] = max(worst[row.layer], error(row))
    return list(worst.values())


def _edges(errors: list[float]) -> tuple[float, float]:
    """Powers of ten with all errors between them, except those that have no place on a log axis."""
    exponents = [math.log10(error) for error in errors if 0.0 < error < math.inf]
    return 10.0 ** (math.floor(min(exponents)) - 1), 10.0 ** (math.floor(max(exponents)) + 1)


def _title(certificate: Certificate) -> str:
    environment = certificate.environment
    verdicts = [
        f"{who}: {'holds' if found is None else f'broken, first in {found.layer!r}'}"
        for who, found in (
            ("sbp_fast", certificate.first_broken),
            ("plain accumulation", certificate.plain_first_broken),
        )
    ]
    where = f"{certificate.samples} samples, {environment['dtype']} on {environment['device']}"
    return "\n".join([*verdicts, where])
