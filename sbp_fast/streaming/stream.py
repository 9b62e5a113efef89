"""The stream of micro-batches as the device sees it: the next one is on its way while one computes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..batches import MicroBatch, as_tensor, copied
from .pinned_ring import PinnedRing


class Arrival(NamedTuple):
    """A micro-batch on the device, and whether it is known to be the last of its large batch."""

    micro_batch: MicroBatch
    is_last: bool


def stream_to(
    device: torch.device,
    micro_batches: Iterable[MicroBatch],
    ring: PinnedRing | None,
    *,
    keep: bool = False,
) -> Iterator[Arrival]:
    """Yields micro-batches with their tensors on ``device``, in order.

    To a CUDA device one micro-batch is always sent ahead: its copy is enqueued before the caller gets
    the one before it, so that it travels while that one computes. Elsewhere nothing travels and nothing
    is read ahead: NumPy rows become tensors, and the last item of a stream is not known to be the last.

    Args:
        keep: micro-batches are wanted after the next has come: where they do not travel they are copied,
            since a stream may use its memory again.
        ring: where host memory is staged for a CUDA device; None for other devices.
    """
    if ring is not None:
        return _send_ahead(device, micro_batches, ring)
    return _hand_on(device, micro_batches, keep)


def _hand_on(
    device: torch.device, micro_batches: Iterable[MicroBatch], keep: bool
) -> Iterator[Arrival]:
    last = len(micro_batches) if isinstance(micro_batches, Sized) else None
    for position, micro_batch in enumerate(micro_batches, start=1):
        arrived = moved(micro_batch, device)
        if keep:
            arrived = MicroBatch(
                copied(arrived.inputs), copied(arrived.targets), arrived.samples, borrowed=False
            )
        yield Arrival(arrived, is_last=position == last)


def _send_ahead(
    device: torch.device, micro_batches: Iterable[MicroBatch], ring: PinnedRing
) -> Iterator[Arrival]:
    remaining = iter(micro_batches)
    try:
        following = _send_next(device, remaining, ring)
        while following is not None:
            sent = following
            following = _send_next(device, remaining, ring)
            ring.wait_for(sent.ticket)
            yield Arrival(sent.micro_batch, is_last=following is None)
    finally:
        ring.join()


class _Sent(NamedTuple):
    micro_batch: MicroBatch
    ticket: int


def _send_next(
    device: torch.device, remaining: Iterator[MicroBatch], ring: PinnedRing
) -> _Sent | None:
    micro_batch = next(remaining, None)
    if micro_batch is None:
        return None
    ticket = ring.open()
    sent = _Sent(moved(micro_batch, device, ring), ticket)
    ring.close()
    return sent


def moved(
    micro_batch: MicroBatch, device: torch.device, ring: PinnedRing | None = None
) -> MicroBatch:
    """A micro-batch as the model sees it: NumPy arrays are tensors, and tensors are on ``device``."""

    borrowed = False

    def move(leaf: Any) -> Any:
        nonlocal borrowed
        if isinstance(leaf, np.ndarray):
            leaf = as_tensor(leaf)
        if not isinstance(leaf, Tensor) or leaf.device == device:
            borrowed |= isinstance(leaf, Tensor)
            return leaf
        if ring is not None and leaf.device.type == "cpu":
            return ring.send(leaf)
        return leaf.to(device)

    inputs, targets = (
        pytree.tree_map(move, tree) for tree in (micro_batch.inputs, micro_batch.targets)
    )
    return MicroBatch(inputs, targets, micro_batch.samples, borrowed=borrowed)
