"""Large-batch training on one small device. See :class:`StreamedAccumulator`, :func:`plan` and
:func:`verify`."""

from .accumulator import StreamedAccumulator
from .certificate import Certificate
from .invariance.layout import declare_sample_dimension
from .invariance.verify import verify
from .memory.host_store import HostBudgetError
from .planning import Plan, plan
from .result import StepResult

__version__ = "0.1.0"

__all__ = [
    "Certificate",
    "HostBudgetError",
    "Plan",
    "StepResult",
    "StreamedAccumulator",
    "__version__",
    "declare_sample_dimension",
    "plan",
    "verify",
]
