"""The stream of micro-batches as the device sees it: the next one is on its way while one computes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..batches import MicroBatch, PyTree, as_tensor
from .pinned_ring import PinnedRing


class Arrival(NamedTuple):
    """A micro-batch on the device, and whether it is the last of its large batch."""

    micro_batch: MicroBatch
    is_last: bool


def stream_to(
    device: torch.device, micro_batches: Iterable[MicroBatch], ring: PinnedRing | None
) -> Iterator[Arrival]:
    """Yields micro-batches with their tensors on ``device``, in order.

    One micro-batch is always sent ahead: its copy is enqueued before the caller gets the one before it,
    so that it travels while that one computes. On the CPU nothing travels: tensors are handed on as they
    are, and NumPy rows become tensors.

    Args:
        ring: where host memory is staged for a CUDA device; None for other devices.
    """
    remaining = iter(micro_batches)
    try:
        following = _send_next(device, remaining, ring)
        while following is not None:
            sent = following
            following = _send_next(device, remaining, ring)
            if ring is not None:
                ring.wait_for(sent.ticket)
            yield Arrival(sent.micro_batch, is_last=following is None)
    finally:
        if ring is not None:
            ring.join()


class _Sent(NamedTuple):
    micro_batch: MicroBatch
    ticket: int


def _send_next(
    device: torch.device, remaining: Iterator[MicroBatch], ring: PinnedRing | None
) -> _Sent | None:
    micro_batch = next(remaining, None)
    if micro_batch is None:
        return None
    ticket = 0

    def move(leaf: Any) -> Any:
        if isinstance(leaf, np.ndarray):
            leaf = as_tensor(leaf)
        if not isinstance(leaf, Tensor) or leaf.device == device:
            return leaf
        if ring is not None and leaf.device.type == "cpu":
            return ring.send(leaf)
        return leaf.to(device)

    if ring is not None:
        ticket = ring.open()

    def move_tree(tree: PyTree) -> PyTree:
        return pytree.tree_map(move, tree)

    inputs, targets = move_tree(micro_batch.inputs), move_tree(micro_batch.targets)
    if ring is not None:
        ring.close()
    return _Sent(MicroBatch(inputs, targets, micro_batch.samples), ticket)
