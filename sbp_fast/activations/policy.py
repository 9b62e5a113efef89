"""The choice among the ways to treat activations, and what all of them offer a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import nn

from ..memory import LiveBytes
from ..memory.host_store import HostStore
from .offload import Offload
from .recompute import Recompute

Meets = Callable[[Sequence[nn.Module]], bool]


class Activations(Protocol):
    """One way, for all steps of an accumulator."""

    def during(
        self, device: torch.device, counter: LiveBytes | None, *, meets: Meets | None
    ) -> AbstractContextManager[HostStore | None]:
        """A context around the passes of one large batch; gives the store in which activations wait.

        Args:
            device: of the computation.
            counter: the count of device memory on the CPU, where there is one.
            meets: whether micro-batches wait for one another somewhere in these modules; what their
                backward pass needs is in host memory by then. None where none ever waits.
        """
        ...


class Keep:
    """``activations="keep"``: they live from forward to backward."""

    def during(
        self, device: torch.device, counter: LiveBytes | None, *, meets: Meets | None
    ) -> AbstractContextManager[HostStore | None]:
        return nullcontext()


def activations_of(
    choice: str, modules: Sequence[nn.Module], host_budget: int | None
) -> Activations:
    """What the option says.

    Args:
        choice: ``"keep"``, ``"recompute"`` or ``"offload"``.
        modules: of the step, the model first.
        host_budget: bytes of host memory that may be used; None for no bound.
    """
    if choice == "recompute":
        return Recompute(modules[0])
    if choice == "offload":
        return Offload(modules, host_budget)
    return Keep()
