"""What becomes of a micro-batch's activations between its forward and its backward pass."""

from .policy import Activations, activations_of

__all__ = ["Activations", "activations_of"]
