"""Memory that one micro-batch after the other comes to, until somebody keeps one."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from ..host_memory import host_memory
from .rows_in_memory import RowsInMemory


class Slot:
    """Buffers for the tensors of a micro-batch, in their order; they grow to the largest seen.

    The tensors have storages of the slot's. A storage that is still in use when its next tensor is wanted
    (by a model that has stored its inputs, say) is left to its users, and another takes its place.

    Args:
        device: of the tensors.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._arrivals: list[torch.UntypedStorage] = []
        # Bytes wanted from each in this large batch, at most.
        self._wanted: list[int] = []
        self._staging: list[Tensor] = []
        self._used = self._staged = 0

    def open(self) -> None:
        self._used = self._staged = 0

    def tensor(self, rows: RowsInMemory) -> Tensor:
        """Where the next tensor of the micro-batch arrives."""
        position, self._used = self._used, self._used + 1
        if position == len(self._arrivals):
            self._arrivals.append(self._storage(0))
            self._wanted.append(0)
        self._wanted[position] = max(self._wanted[position], rows.nbytes)
        storage = self._arrivals[position]
        if storage.nbytes() < rows.nbytes or _users(storage) > 1:
            # First, so that the old one is gone when the new one comes.
            del storage
            self._arrivals[position] = self._storage(0)
            self._arrivals[position] = self._storage(self._wanted[position])
        # A tensor of its own, not a view: what is written to others does not count as written to it.
        empty = torch.empty(0, dtype=rows.dtype, device=self._device)
        return empty.set_(self._arrivals[position], 0, rows.shape, rows.strides)

    def end(self) -> None:
        """Ends the large batch. Where micro-batches have become smaller, memory is short."""
        for position, wanted in enumerate(self._wanted):
            if self._arrivals[position].nbytes() > wanted:
                self._arrivals[position] = self._storage(0)
        self._wanted = [0] * len(self._wanted)

    def staging(self, nbytes: int) -> Tensor:
        """Pinned memory for the next tensor that needs it."""
        position, self._staged = self._staged, self._staged + 1
        if position == len(self._staging):
            self._staging.append(torch.empty(0, dtype=torch.uint8))
        if self._staging[position].nbytes < nbytes:
            self._staging[position] = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        return self._staging[position]

    def _storage(self, nbytes: int) -> torch.UntypedStorage:
        with host_memory() if self._device.type == "cpu" else nullcontext():
            return torch.empty(nbytes, dtype=torch.uint8, device=self._device).untyped_storage()


def _users(storage: torch.UntypedStorage) -> int:
    """How many hold it: tensors, whatever keeps them, and the slot itself."""
    return int(torch._C._storage_Use_Count(storage._cdata))
