"""Estimates the gradient noise scale from steps, each of which is compared with a part of itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .noise_scale import NoiseScale


class Comparison(NamedTuple):
    """The gradient of a large batch, and what a part of it contributed.

    Attributes:
        part: the square of the norm of the part's contribution to the mean gradient; float64, no
            dimensions.
        whole: the same of the mean gradient itself.
        fraction: of the large batch's weight that the part has (of its samples, where all count alike).
        samples: in the large batch.
    """

    part: Tensor
    whole: Tensor
    fraction: float | Tensor
    samples: int


class NoiseScaleEstimator:
    """Smooths what single steps say of the noise scale.

    With the fraction ``a`` of the weight of ``N`` samples in the part, its contribution to the mean
    gradient is ``a G`` plus noise of the variance ``a tr(Sigma) / N``: weights are taken for independent
    observations (tokens, samples). Of the squares ``p`` of the part and ``w`` of the whole then::

        E p = a^2 |G|^2 + a tr(Sigma) / N        tr(Sigma) = N (p - a^2 w) / (a (1 - a))
        E w =     |G|^2 +   tr(Sigma) / N        |G|^2     = w - tr(Sigma) / N

    McCandlish et al. 2018, arXiv 1812.06162, appendix A.1, whose small batch has ``a N`` samples and the
    gradient norm ``sqrt(p) / a``. As there, both are averaged before they are divided: they are without
    bias, their ratio is not. Averages are exponential, and corrected for their beginning.

    Args:
        decay: what the average keeps from step to step. 0.99 looks back over some hundred steps.

    Raises:
        ValueError: ``decay`` is not at least 0 and below 1.
    """

    def __init__(self, decay: float = 0.99) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(
                f"decay is {decay!r}; it must be at least 0 and below 1, 0.99 for the last hundred steps"
            )
        self._decay = decay
        self._estimate: NoiseScale | None = None

    def add(self, comparison: Comparison, counts: Tensor) -> None:
        """Takes one step into the average, without waiting for the device.

        Args:
            counts: False (no dimensions) for a step that does not count, since it is not finite.
        """
        part, whole, fraction, samples = comparison
        covariance = samples * (part - fraction**2 * whole) / (fraction * (1.0 - fraction))
        figures = torch.stack((covariance, whole - covariance / samples))
        product = figures.prod(0, keepdim=True)
        seen = torch.cat((figures, figures**2, product))
        # A part without weight, or with all of it, gives no finite figure.
        counts = counts & torch.isfinite(product)
        if self._estimate is None:
            averages, steps = torch.zeros_like(seen), torch.zeros_like(product)
        else:
            averages = self._estimate.averages.to(whole.device)
            steps = self._estimate.counted.to(whole.device)
        self._estimate = NoiseScale(
            torch.where(counts, averages.lerp(seen, 1.0 - self._decay), averages),
            steps + counts,
            self._decay,
        )

    @property
    def estimate(self) -> NoiseScale | None:
        """As of now; None before the first step."""
        return self._estimate

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` takes: a number, and two tensors or None."""
        averages = counted = None
        if self._estimate is not None:
            averages, counted = self._estimate.averages, self._estimate.counted
        return {"decay": self._decay, "averages": averages, "counted": counted}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a saved state, with its decay."""
        self._decay = float(state["decay"])
        averages, counted = state["averages"], state["counted"]
        self._estimate = None if averages is None else NoiseScale(averages, counted, self._decay)
