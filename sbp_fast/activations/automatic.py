"""``activations="auto"``: whichever of the other ways a plan has chosen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from ..memory import LiveBytes
from ..memory.host_store import HostStore
from .blocks import Blocks
from .offload import Offload
from .policy import Activations, Keep, Meets, Policy
from .recompute import Recompute


class Automatic:
    """Follows a policy; until it is told one, ``"keep"``.

    Args:
        modules: of the step, the model first.
        host_budget: bytes of host memory that may be used; None for no bound.
        blocks: of the model; None: those that it has when a step begins.

    Attributes:
        policy: the one that is followed.
        is_running: whether a step is under way, which ends as it began.
    """

    def __init__(
        self, modules: Sequence[nn.Module], host_budget: int | None, blocks: Blocks | None = None
    ) -> None:
        self._recompute = Recompute(modules[0], blocks)
        self._ways: Mapping[str, Activations] = {
            "keep": Keep(),
            "recompute": self._recompute,
            "offload": Offload(modules, host_budget),
        }
        self.policy = Policy("keep")
        self.is_running = False

    def __str__(self) -> str:
        return str(self.policy)

    @property
    def writes(self) -> Mapping[nn.Module, bool]:
        """By key, whether a block changes its inputs in place, as far as that is known."""
        return self._recompute.writes

    def learn(self, writes: Mapping[nn.Module, bool]) -> None:
        """So that no block's first call copies its inputs, of which a plan knows nothing."""
        self._recompute.writes.update(writes)

    @contextmanager
    def during(
        self, device: torch.device, counter: LiveBytes | None, *, meets: Meets | None
    ) -> Iterator[HostStore | None]:
        """As the policy's own way."""
        self._recompute.only = self.policy.recomputed
        self.is_running = True
        try:
            with self._ways[self.policy.name].during(device, counter, meets=meets) as store:
                yield store
        finally:
            self.is_running = False
