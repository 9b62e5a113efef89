"""Gradients on their way from autograd to ``p.grad``: collected, accumulated, finalised."""

from .accumulators import Accumulators, autograd_can_accumulate
from .finalise import Finaliser
from .hooks import GradientHooks

__all__ = ["Accumulators", "Finaliser", "GradientHooks", "autograd_can_accumulate"]
