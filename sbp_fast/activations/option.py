"""From the option's name to the way it stands for."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from .automatic import Automatic
from .offload import Offload
from .policy import Activations, Keep
from .recompute import Recompute


def activations_of(
    choice: str, modules: Sequence[nn.Module], host_budget: int | None
) -> Activations:
    """What the option says.

    Args:
        choice: ``"keep"``, ``"recompute"``, ``"offload"`` or ``"auto"``.
        modules: of the step, the model first.
        host_budget: bytes of host memory that may be used; None for no bound.
    """
    if choice == "recompute":
        return Recompute(modules[0])
    if choice == "offload":
        return Offload(modules, host_budget)
    if choice == "auto":
        return Automatic(modules, host_budget)
    return Keep()
