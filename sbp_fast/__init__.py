"""Large-batch training on one small device. See :class:`StreamedAccumulator`."""

from .accumulator import StreamedAccumulator
from .invariance.layout import declare_sample_dimension
from .memory.host_store import HostBudgetError
from .result import StepResult

__version__ = "0.1.0"

__all__ = [
    "HostBudgetError",
    "StepResult",
    "StreamedAccumulator",
    "__version__",
    "declare_sample_dimension",
]
