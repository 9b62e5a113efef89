"""The ways through a large batch: one micro-batch after the other, all together, or twice."""

from .computation import Computation
from .one_by_one import compute_one_by_one
from .together import compute_together
from .twice import compute_twice

__all__ = ["Computation", "compute_one_by_one", "compute_together", "compute_twice"]
