"""What a run can be tuned by: the gradient noise scale."""

from .noise_estimator import NoiseScaleEstimator
from .noise_scale import NoiseScale

__all__ = ["NoiseScale", "NoiseScaleEstimator"]
