"""Gradients on their way from autograd to ``p.grad``: collected, accumulated, finalised."""

from .accumulators import Accumulators, autograd_can_accumulate
from .finalise import Finaliser
from .fused import FusedGradients
from .hooks import GradientHooks

__all__ = [
    "Accumulators",
    "Finaliser",
    "FusedGradients",
    "GradientHooks",
    "autograd_can_accumulate",
]
