"""The gradient noise scale: up to which size a larger batch saves steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from .confidence import Means


@dataclass(frozen=True, eq=False)
class NoiseScale:
    """The noise of the gradient, in samples: ``B = tr(Sigma) / |G|^2``.

    ``Sigma`` is the covariance of the gradient of one sample, ``G`` the mean of such gradients. The
    gradient of a batch much smaller than ``B`` is mostly noise, and twice the batch saves half of the
    steps; of one much larger, mostly signal, and a larger batch saves next to nothing (McCandlish et al.
    2018, arXiv 1812.06162, section 2, "B_simple").

    Nothing is read back from the device until a property is.

    Attributes:
        averages: exponential, over steps, starting from zero: of the estimates of ``tr(Sigma)`` and of
            ``|G|^2``, of their squares, and of their product; float64, shape ``(5,)``.
        counted: how many steps are in them; float64, shape ``(1,)``.
        decay: what they keep from step to step.
    """

    averages: Tensor
    counted: Tensor
    decay: float

    @property
    def value(self) -> float:
        """In samples. Infinite where no gradient can be told from the noise; NaN without any step."""
        if self.steps == 0:
            return math.nan
        if self.gradient_squared <= 0.0:
            return math.inf
        return max(self.covariance, 0.0) / self.gradient_squared

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Where the noise scale is with this probability, in samples.

        From how much the figures differ from step to step. The upper bound is infinite where the gradient
        cannot be told from zero, and after a single step.

        Raises:
            ValueError: ``confidence`` is not between 0 and 1.
        """
        if not 0.0 < confidence < 1.0:
            raise ValueError(f"confidence is {confidence!r}; it must be between 0 and 1, 0.95 say")
        effective = self._effective_steps
        if effective < 2.0:
            return 0.0, math.inf
        x, y, x_squared, y_squared, product = self._means
        # What the figures of single steps vary by, and the means of as many.
        of_mean = 1.0 / (effective - 1.0)
        return Means(
            x,
            y,
            of_mean * (x_squared - x * x),
            of_mean * (y_squared - y * y),
            of_mean * (product - x * y),
            degrees_of_freedom=effective - 1.0,
        ).ratio_interval(confidence)

    @cached_property
    def steps(self) -> int:
        """Large batches that it was estimated from; older ones count less."""
        return int(self.counted.item())

    @property
    def covariance(self) -> float:
        """The trace of ``Sigma``, smoothed and without bias: below zero it is an error of sampling."""
        return self._means[0]

    @property
    def gradient_squared(self) -> float:
        """``|G|^2``, smoothed and without bias: below zero it is an error of sampling."""
        return self._means[1]

    @cached_property
    def _means(self) -> list[float]:
        weight = 1.0 - self.decay**self.steps
        return [average / weight if weight else math.nan for average in self.averages.tolist()]

    @property
    def _effective_steps(self) -> float:
        """As many steps of equal weight would have a mean that is known as well."""
        if self.steps == 0:
            return 0.0
        faded = self.decay**self.steps
        return (1.0 - faded) / (1.0 + faded) * (1.0 + self.decay) / (1.0 - self.decay)

    def __str__(self) -> str:
        low, high = self.interval()
        return (
            f"noise scale {self.value:.4g} samples (95% interval {low:.4g} to {high:.4g}, "
            f"{self.steps} steps)"
        )
