"""The next micro-batch, gathered and sent by a thread that never needs the interpreter.

The native ring (csrc/prefetch) has the thread, the side stream and the events; here is its memory. On a
CUDA device rows go through pinned slots to device slots. On the CPU those that must be gathered (by
index, from a mapped file) are gathered into slots; all others stay views of the caller's.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..batches import can_be_viewed
from ..data.rows import Rows
from ..host_memory import host_memory
from ..ops.native import cuda_engine, load_cuda, load_prefetch, prefetch_module
from .pinned_ring import PinnedRing
from .rows_in_memory import RowsInMemory, rows_in_memory
from .slot import Slot


def make_ring(device: torch.device) -> Prefetcher | PinnedRing | None:
    """The best that this installation has; None where micro-batches are prepared when they are needed."""
    native = load_prefetch().usable
    if device.type == "cpu":
        return Prefetcher(device, prefetch_module()) if native else None
    if device.type == "cuda":
        if native and load_cuda().usable:
            return Prefetcher(device, prefetch_module())
        return PinnedRing(device)
    return None


class Prefetcher:
    """Prepares micro-batches ahead, in two slots that are kept from one large batch to the next.

    A forked process makes itself a thread of its own.

    Args:
        device: where micro-batches are computed.
        native: the module of csrc/prefetch.
    """

    def __init__(self, device: torch.device, native: ModuleType) -> None:
        self._device = device
        self._native = native
        self._slots = [Slot(device) for _ in range(native.SLOTS)]
        self._ring: Any = None
        self._process = 0
        self._kept = False
        self._turn = 0
        self._pieces: list[Any] = []
        # Memory that is read until the large batch has ended, at most: that of two micro-batches.
        self._owners: list[list[Any]] = [[] for _ in self._slots]

    def takes(self, leaf: Any) -> bool:
        """Whether a leaf is worth to be, or must be, copied here."""
        if isinstance(leaf, Rows):
            return not isinstance(leaf.source, Tensor) or _is_plain(leaf.source)
        if isinstance(leaf, np.ndarray):
            return leaf.ndim > 0 and (self._travels or not can_be_viewed(leaf))
        return isinstance(leaf, Tensor) and self._travels and _is_plain(leaf)

    def open(self, *, kept: bool) -> None:
        """Begins a micro-batch.

        Args:
            kept: it is wanted after others have come: it gets memory of its own.
        """
        self._kept = kept
        self._pieces = []
        self._owners[self._turn] = []
        self._slot.open()

    def send(self, leaf: Any) -> Tensor:
        """The tensor that a leaf becomes; it must not be used before :meth:`wait_for`."""
        rows = rows_in_memory(leaf)
        arrived = self._fresh(rows) if self._kept else self._slot.tensor(rows)
        gathered, device = arrived.data_ptr(), 0
        if self._travels:
            device = gathered
            gathered = 0 if rows.pinned else self._staged(rows)
        self._pieces.append(self._native.Piece(**rows.source, gathered=gathered, device=device))
        self._owners[self._turn] += [rows.owners, arrived]
        return arrived

    def close(self) -> int:
        """Ends the micro-batch, and the thread begins with it; returns the ticket to wait for."""
        if not self._is_running:
            self._ring = self._native.Ring(self._engine())
            self._process = os.getpid()
        ticket = int(self._ring.submit(self._pieces, self._main()))
        # As the ring does: slots have events of their own there.
        self._turn = (self._turn + 1) % len(self._slots)
        return ticket

    def wait_for(self, ticket: int) -> None:
        """Waits for the rows of a micro-batch to be read; the main stream waits for its copies.

        Raises:
            IndexError: a row is outside of its source.
        """
        self._ring.receive(ticket, self._main())

    def finish_reading(self) -> None:
        """Waits until memory of the caller's that is not pinned may be filled again."""
        if self._is_running:
            self._ring.finish_reading()

    def join(self) -> None:
        """Ends the large batch: nothing reads memory of the caller's or writes to that of the device."""
        if self._is_running:
            self._ring.join(self._main())
        self._turn = 0
        self._pieces = []
        self._owners = [[] for _ in self._slots]
        for slot in self._slots:
            slot.end()

    @property
    def _is_running(self) -> bool:
        return self._ring is not None and self._process == os.getpid()

    @property
    def _travels(self) -> bool:
        return self._device.type != "cpu"

    @property
    def _slot(self) -> Slot:
        return self._slots[self._turn]

    def _staged(self, rows: RowsInMemory) -> int:
        return self._slot.staging(rows.nbytes).data_ptr()

    def _fresh(self, rows: RowsInMemory) -> Tensor:
        with nullcontext() if self._travels else host_memory():
            return torch.empty_strided(
                rows.shape, rows.strides, dtype=rows.dtype, device=self._device
            )

    def _engine(self) -> Any:
        if not self._travels:
            return None
        index = self._device.index
        return self._native.make_engine(
            cuda_engine(), torch.cuda.current_device() if index is None else index
        )

    def _main(self) -> int:
        return torch.cuda.current_stream(self._device).cuda_stream if self._travels else 0


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is its bytes in host memory, without a graph to go back through."""
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.device.type == "cpu"
        and tensor.layout is torch.strided
        and not tensor.requires_grad
        and not tensor.is_quantized
    )
