"""Copies from the host to a CUDA device on a side stream, through a ring of pinned slots.

For installations without the native prefetcher: the caller's thread fills the slots.

Three orders are kept by events, and nothing waits for more than it must:

1. The side stream waits for what the main stream had in flight when a micro-batch's device memory was
   allocated, because that memory may have been freed by work that is still running.
2. The main stream waits for a micro-batch's copy before it computes with it.
3. The host waits for a slot's last copy before it fills the slot again.

Device memory is allocated on the main stream, so the caching allocator needs no ``record_stream``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..batches import as_tensor
from ..data.rows import Rows

_SLOTS = 2


@dataclass
class _Slot:
    copied: torch.cuda.Event
    buffers: list[Tensor] = field(default_factory=list)
    used: int = 0


class PinnedRing:
    """Two pinned slots: one is filled by the host while the other is read by the copy engine.

    Slots grow to the largest micro-batch seen and are kept for the next large batch.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._side = torch.cuda.Stream(device)
        self._slots = [_Slot(torch.cuda.Event()) for _ in range(_SLOTS)]
        self._next = 0
        self._borrows = False

    def takes(self, leaf: Any) -> bool:
        """Whether a leaf must be sent."""
        if isinstance(leaf, Rows):
            leaf = leaf.source
        return isinstance(leaf, np.ndarray) or (
            isinstance(leaf, Tensor) and leaf.device.type == "cpu"
        )

    def open(self, *, kept: bool) -> None:
        """Begins a micro-batch. Its memory on the device is its own, whether it is kept or not."""
        del kept
        slot = self._slots[self._next % _SLOTS]
        slot.copied.synchronize()
        slot.used = 0
        self._next += 1

    def send(self, leaf: Tensor | np.ndarray[Any, Any] | Rows) -> Tensor:
        """Enqueues the copy of one leaf; the result must not be used before :meth:`wait_for`."""
        rows = leaf if isinstance(leaf, Tensor) else as_tensor(leaf)
        slot = self._slots[(self._next - 1) % _SLOTS]
        source = rows
        if rows.is_pinned():
            self._borrows = True
        else:
            source = self._stage(slot, rows)
        main = torch.cuda.current_stream(self._device)
        # In the layout of the rows (channels_last, say).
        arrived = torch.empty_like(rows, device=self._device)
        self._side.wait_stream(main)
        with torch.cuda.stream(self._side):
            arrived.copy_(source, non_blocking=True)
        return arrived

    def close(self) -> int:
        """Ends the micro-batch: everything of it is enqueued. Returns the ticket to wait for."""
        self._slots[(self._next - 1) % _SLOTS].copied.record(self._side)
        return self._next - 1

    def finish_reading(self) -> None:
        """What is not pinned has been read."""

    def wait_for(self, ticket: int) -> None:
        """Makes the main stream wait for the copies of one micro-batch."""
        slot = self._slots[ticket % _SLOTS]
        torch.cuda.current_stream(self._device).wait_event(slot.copied)

    def join(self) -> None:
        """Ends the large batch.

        The main stream waits for every copy, so that memory of an abandoned micro-batch is not reused
        under a copy still on its way. So does the host where copies read pinned memory of the caller's,
        who may fill it again.
        """
        torch.cuda.current_stream(self._device).wait_stream(self._side)
        if self._borrows:
            self._borrows = False
            for slot in self._slots:
                slot.copied.synchronize()

    def _stage(self, slot: _Slot, rows: Tensor) -> Tensor:
        size = rows.nbytes
        if slot.used == len(slot.buffers):
            slot.buffers.append(torch.empty(size, dtype=torch.uint8, pin_memory=True))
        elif slot.buffers[slot.used].nbytes < size:
            slot.buffers[slot.used] = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        dense = torch.empty_like(rows, device="meta")
        staged = slot.buffers[slot.used][:size].view(rows.dtype)
        slot.used += 1
        return staged.as_strided(dense.shape, dense.stride()).copy_(rows)
