"""What a run can be tuned by: the gradient noise scale, and the learning rate's own gradient."""

from .advice import Advice, advise
from .hypergradient import HypergradientLR
from .noise_estimator import NoiseScaleEstimator
from .noise_scale import NoiseScale

__all__ = ["Advice", "HypergradientLR", "NoiseScale", "NoiseScaleEstimator", "advise"]
