"""What becomes of a micro-batch's activations between its forward and its backward pass."""

from .automatic import Automatic
from .option import activations_of
from .policy import Activations, Policy

__all__ = ["Activations", "Automatic", "Policy", "activations_of"]
