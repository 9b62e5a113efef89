"""Pinned host memory that is allocated once and used again, from micro-batch to micro-batch."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

_SMALLEST_STEP = 4096


class PinnedPool:
    """Hands out pinned memory; what is given back is handed out again.

    Sizes are rounded up by an eighth at most, so that ragged micro-batches find what others have left.
    Nothing here waits for a copy: whoever takes memory must read and write it on one stream alone, the
    same as all others.

    Attributes:
        nbytes: allocated so far.
    """

    def __init__(self) -> None:
        self.nbytes = 0
        self._free: defaultdict[int, list[Tensor]] = defaultdict(list)

    def take(self, nbytes: int) -> Tensor:
        """At least ``nbytes`` of pinned memory; one dimension, uint8."""
        size = size_class(nbytes)
        free = self._free[size]
        if free:
            return free.pop()
        self.nbytes += size
        return self._allocate(size)

    def give_back(self, memory: Tensor) -> None:
        self._free[memory.nbytes].append(memory)

    def _allocate(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)


def size_class(nbytes: int) -> int:
    """The size that is allocated for so many bytes: one of eight for each doubling."""
    step = max(_SMALLEST_STEP, (1 << nbytes.bit_length()) // 16)
    return -(-nbytes // step) * step
