"""How far gradients are from the oracle's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

# A gradient below this part of the norm of all gradients has nearly cancelled. It has the rounding errors
# of the terms that cancelled, so it is measured against this part instead of its own norm.
VANISHING = 1e-3


@dataclass(frozen=True)
class Distance:
    """Relative errors: of each parameter's gradient, and of all gradients as one vector.

    Not finite gradients are infinitely far.
    """

    of: Mapping[str, float]
    total: float

    @property
    def worst(self) -> float:
        return max(self.of.values())


class Oracle:
    """The gradients that others are compared with.

    Args:
        gradients: by parameter, float64 on the host.

    Attributes:
        norms: the 2-norm of each.
        norm: of all.
    """

    def __init__(self, gradients: Mapping[str, Tensor]) -> None:
        self._gradients = gradients
        self.norms = {name: float(gradient.norm()) for name, gradient in gradients.items()}
        self.norm = math.hypot(*self.norms.values())
        # Of those that are finite, so that one that is not is found where it is.
        self._floor = VANISHING * math.hypot(*filter(math.isfinite, self.norms.values()))

    def distance(self, gradients: Mapping[str, Tensor]) -> Distance:
        """From gradients by the same names."""
        apart = {
            name: float((gradients[name] - expected).norm())
            for name, expected in self._gradients.items()
        }
        return Distance(
            of={name: _ratio(apart[name], max(self.norms[name], self._floor)) for name in apart},
            total=_ratio(math.hypot(*apart.values()), self.norm),
        )

    def infinitely_far(self) -> Distance:
        """Of a run that gave no gradients."""
        return Distance(of=dict.fromkeys(self.norms, math.inf), total=math.inf)


def _ratio(apart: float, norm: float) -> float:
    if not (math.isfinite(apart) and math.isfinite(norm)):
        return math.inf
    if norm == 0.0:
        return 0.0 if apart == 0.0 else math.inf
    return apart / norm
