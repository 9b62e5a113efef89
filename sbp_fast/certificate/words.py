"""A certificate as text."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from ..report.table import format_table

if TYPE_CHECKING:
    from .certificate import Broken, Certificate

WORST_LAYERS = 5
PLAIN = "plain accumulation"


class _Layer(NamedTuple):
    """The worst of a layer's parameters, of all runs that gave gradients; None where none did.

    ``excess`` is the error over what is put down to rounding.
    """

    name: str
    excess: float
    error: float | None
    plain_error: float | None


def in_words(certificate: Certificate) -> str:
    """Totals by micro-batch size, the worst layers, and the verdict."""
    totals = format_table(
        ("relative error of the whole gradient", "sbp_fast", PLAIN),
        [
            (
                f"micro-batch size {total.micro_batch_size}",
                "failed" if total.failure else scientific(total.error),
                "failed" if total.plain_failure else scientific(total.plain_error),
            )
            for total in certificate.totals
        ],
    )
    layers = format_table(
        ("worst layers, over all sizes", "sbp_fast", PLAIN),
        [
            (layer.name, scientific(layer.error), scientific(layer.plain_error))
            for layer in _worst_layers(certificate)
        ],
    )
    return "\n\n".join([_heading(certificate), totals, layers, _verdict(certificate)])


def scientific(error: float | None) -> str:
    """A relative error as text, such as ``3.1e-07``."""
    if error is None:
        return "-"
    return f"{error:.1e}" if math.isfinite(error) else "not finite"


def _heading(certificate: Certificate) -> str:
    dtype, device = certificate.environment["dtype"], certificate.environment["device"]
    lines = [
        f"Equivalence certificate: {certificate.samples} samples, {dtype} on {device}",
        f"Compared with {certificate.oracle}",
    ]
    if certificate.samples < certificate.samples_asked:
        lines.append(
            f"These are the first of {certificate.samples_asked} samples: more do not fit in memory at "
            "once"
        )
    return "\n".join(lines)


def _worst_layers(certificate: Certificate) -> list[_Layer]:
    """What exceeds the tolerance comes first, then where plain accumulation is farthest off."""
    failed = {t.micro_batch_size for t in certificate.totals if t.failure}
    plain_failed = {t.micro_batch_size for t in certificate.totals if t.plain_failure}
    layers = []
    for name in dict.fromkeys(row.layer for row in certificate.rows):
        rows = [row for row in certificate.rows if row.layer == name]
        ours = [row for row in rows if row.micro_batch_size not in failed]
        plain = [row.plain_error for row in rows if row.micro_batch_size not in plain_failed]
        layers.append(
            _Layer(
                name,
                max((row.error / row.tolerance for row in ours), default=0.0),
                max((row.error for row in ours), default=None),
                max(plain, default=None),
            )
        )

    def badness(layer: _Layer) -> tuple[float, float]:
        return (layer.excess if layer.excess > 1.0 else 0.0, layer.plain_error or 0.0)

    return sorted(layers, key=badness, reverse=True)[:WORST_LAYERS]


def _verdict(certificate: Certificate) -> str:
    dtype = certificate.environment["dtype"]
    allowed = f"{certificate.tolerance:.1e}"
    most = max(row.tolerance for row in certificate.rows)
    if most > certificate.tolerance:
        allowed += f", up to {most:.1e} where the whole batch at once rounds more"
    lines = [
        f"Put down to rounding: {allowed}",
        f"Rounding of the whole batch at once in {dtype}: {scientific(certificate.rounding)}",
    ]
    if certificate.rounding > certificate.tolerance:
        lines.append(
            f"That is more than usual, and what is smaller cannot be seen in {dtype}: to see it, verify "
            "the model in float64"
        )
    for total in certificate.totals:
        size = total.micro_batch_size
        if total.failure:
            lines.append(f"sbp_fast at micro-batch size {size} ended in {total.failure}")
        if total.plain_failure:
            lines.append(f"{PLAIN} at micro-batch size {size} ended in {total.plain_failure}")
    overflown = next((row for row in certificate.rows if not math.isfinite(row.norm)), None)
    if overflown is not None:
        lines.append(
            f"The whole batch's own gradient of {overflown.parameter!r} is not finite in float64: look "
            "for values in the batch, or a loss, that are not"
        )
    return "\n".join(
        [
            *lines,
            f"{'sbp_fast':<{len(PLAIN)}}  {_finding(certificate.first_broken)}",
            f"{PLAIN}  {_finding(certificate.plain_first_broken)}",
        ]
    )


def _finding(broken: Broken | None) -> str:
    if broken is None:
        return "HOLDS: the whole batch's gradient at every micro-batch size"
    off = f"off by {broken.error:.1e}" if math.isfinite(broken.error) else "not finite or not there"
    return (
        f"BROKEN: first in layer {broken.layer!r} at micro-batch size {broken.micro_batch_size}, where "
        f"the gradient of {broken.parameter!r} is {off}"
    )
