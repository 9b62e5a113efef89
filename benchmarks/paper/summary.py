"""Mean, standard deviation and confidence interval of a few figures."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Summary:
    """Of one figure over the seeds.

    Attributes:
        deviation: the sample's standard deviation; 0 for a single value.
        margin: half the width of the 95% confidence interval of the mean (Student's t); infinite for a
            single value.
    """

    mean: float
    deviation: float
    margin: float
    count: int

    @property
    def low(self) -> float:
        return self.mean - self.margin

    @property
    def high(self) -> float:
        return self.mean + self.margin


def summarise(values: Sequence[float]) -> Summary:
    """Raises ValueError without values."""
    if not values:
        raise ValueError("no values to summarise; expected at least one")
    mean = statistics.fmean(values)
    if len(values) == 1:
        return Summary(mean, 0.0, math.inf, 1)
    deviation = statistics.stdev(values)
    margin = student_quantile(len(values) - 1) * deviation / math.sqrt(len(values))
    return Summary(mean, deviation, margin, len(values))


def student_quantile(freedom: int, confidence: float = CONFIDENCE) -> float:
    """The ``t`` within ``+-t`` of which a variable with Student's distribution lies with this
    probability.

    Args:
        freedom: degrees of freedom, at least 1.
    """
    low, high = 0.0, 1.0
    while _probability_within(high, freedom) < confidence:
        high *= 2
    # Halved until neighbouring floats are reached.
    while low < (middle := (low + high) / 2) < high:
        if _probability_within(middle, freedom) < confidence:
            low = middle
        else:
            high = middle
    return high


def _probability_within(t: float, freedom: int) -> float:
    """``P(|T| <= t)``: the finite series of Abramowitz and Stegun, "Handbook of Mathematical Functions",
    26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(freedom))
    cosine = math.cos(angle) ** 2
    odd = freedom % 2
    term, total = 1.0, 0.0
    for index in range(freedom // 2):
        total += term
        term *= (2 * index + 1 + odd) / (2 * index + 2 + odd) * cosine
    if odd:
        return 2 / math.pi * (angle + math.sin(angle) * math.cos(angle) * total)
    return math.sin(angle) * total
