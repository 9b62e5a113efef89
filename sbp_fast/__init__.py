"""Large-batch training on one small device. See :class:`StreamedAccumulator`."""

from .accumulator import StreamedAccumulator
from .result import StepResult

__version__ = "0.1.0"

__all__ = ["StepResult", "StreamedAccumulator", "__version__"]
