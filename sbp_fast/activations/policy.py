"""The ways to treat activations, and what all of them offer a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from ..memory import LiveBytes
from ..memory.host_store import HostStore

Meets = Callable[[Sequence[nn.Module]], bool]


@dataclass(frozen=True)
class Policy:
    """What becomes of activations. As text: ``"keep"``, ``"recompute 3 of 16 blocks"``.

    Attributes:
        name: ``"keep"``, ``"recompute"`` or ``"offload"``.
        recomputed: the keys (:attr:`.blocks.Blocks.keys`) of the blocks that are computed again, where
            these are not all; the others are kept.
        blocks: how many there are.
    """

    name: str
    recomputed: frozenset[nn.Module] | None = None
    blocks: int = 0

    def __str__(self) -> str:
        if self.recomputed is None:
            return self.name
        return f"{self.name} {len(self.recomputed)} of {self.blocks} blocks"


class Activations(Protocol):
    """One way, for all steps of an accumulator; as text, which."""

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

    def __str__(self) -> str:
        return "keep"

    def during(
        self, device: torch.device, counter: LiveBytes | None, *, meets: Meets | None
    ) -> AbstractContextManager[HostStore | None]:
        return nullcontext()
