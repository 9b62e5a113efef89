"""The bound on device memory that a step keeps, and what counts against it from the beginning."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .budget import format_bytes
from .device_budget import memory_budget
from .out_of_memory import NothingSmallerError


class StepBudget:
    """Device memory of which a step takes no more than this.

    Args:
        device: of the step.
        limit: in bytes.

    Raises:
        ValueError: the device has not as much, or no budgets (it is neither a CPU nor a CUDA device).
    """

    def __init__(self, device: torch.device, limit: int) -> None:
        self._device = device
        self.limit = limit
        self._memory = memory_budget(device, limit)

    @contextmanager
    def holding(
        self, modules: Sequence[nn.Module], optimizer: torch.optim.Optimizer
    ) -> Iterator[None]:
        """While inside, more is out of memory. What the modules and the optimizer have counts.

        Raises:
            NothingSmallerError: that alone is more.
        """
        kept = list(_kept(modules, optimizer))
        try:
            self._memory.track(kept)
        except torch.OutOfMemoryError as error:
            size = sum(
                {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in kept}.values()
            )
            raise NothingSmallerError(
                f"memory_budget is {format_bytes(self.limit)}, but parameters, gradients, buffers and "
                f"optimizer state alone take {format_bytes(size)}; raise it to more than that"
            ) from error
        with self._memory:
            yield


def _kept(modules: Sequence[nn.Module], optimizer: torch.optim.Optimizer) -> Iterable[Tensor]:
    for module in modules:
        for parameter in module.parameters():
            yield parameter
            if parameter.grad is not None:
                yield parameter.grad
        yield from module.buffers()
    for state in optimizer.state.values():
        yield from (leaf for leaf in pytree.tree_leaves(state) if isinstance(leaf, Tensor))
