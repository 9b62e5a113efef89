"""The stream of micro-batches as the device sees it: the next one is on its way while one computes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..batches import MicroBatch, as_tensor, copied
from ..data.rows import Rows


class Arrival(NamedTuple):
    """A micro-batch on the device, and whether it is known to be the last of its large batch."""

    micro_batch: MicroBatch
    is_last: bool


class Ring(Protocol):
    """Slots through which micro-batches go, one after the other: open, send each leaf, close; and wait
    for one before the next but one is opened."""

    def takes(self, leaf: Any) -> bool: ...

    def open(self, *, kept: bool) -> None: ...

    def send(self, leaf: Any) -> Tensor: ...

    def close(self) -> int: ...

    def wait_for(self, ticket: int) -> None: ...

    def finish_reading(self) -> None: ...

    def join(self) -> None: ...


def stream_to(
    device: torch.device,
    micro_batches: Iterable[MicroBatch],
    ring: Ring | None,
    *,
    keep: bool = False,
) -> Iterator[Arrival]:
    """Yields micro-batches with their tensors on ``device``, in order.

    To a CUDA device one micro-batch is always sent ahead: its copy is enqueued before the caller gets
    the one before it, so that it travels while that one computes. On the CPU those of a list whose rows
    must be gathered (by index, from a mapped file) are gathered ahead in the same way. Elsewhere nothing
    travels and nothing is read ahead: NumPy rows become tensors, and the last item of a stream is not
    known to be the last.

    Args:
        keep: micro-batches are wanted after the next has come: they get memory of their own. Those of a
            stream are copied where they do not travel, since it may use its memory again.
        ring: through which they go; None: each is prepared when its turn comes.
    """
    if ring is not None and (device.type != "cpu" or _are_worth_it(micro_batches, ring)):
        return _send_ahead(device, micro_batches, ring, keep)
    return _hand_on(device, micro_batches, keep)


def _are_worth_it(micro_batches: Iterable[MicroBatch], ring: Ring) -> bool:
    """Whether micro-batches on the CPU have something to be prepared, and may be read ahead."""
    if not isinstance(micro_batches, list) or not micro_batches:
        return False
    leaves = pytree.tree_leaves((micro_batches[0].inputs, micro_batches[0].targets))
    return any(map(ring.takes, leaves))


def _hand_on(
    device: torch.device, micro_batches: Iterable[MicroBatch], keep: bool
) -> Iterator[Arrival]:
    last = len(micro_batches) if isinstance(micro_batches, Sized) else None
    for position, micro_batch in enumerate(micro_batches, start=1):
        arrived = moved(micro_batch, device)
        if keep and last is None:
            arrived = MicroBatch(
                copied(arrived.inputs), copied(arrived.targets), arrived.samples, borrowed=False
            )
        yield Arrival(arrived, is_last=position == last)


def _send_ahead(
    device: torch.device, micro_batches: Iterable[MicroBatch], ring: Ring, keep: bool
) -> Iterator[Arrival]:
    uses_memory_again = not isinstance(micro_batches, Sized)
    remaining = iter(micro_batches)

    def send_next() -> _Sent | None:
        if uses_memory_again:
            ring.finish_reading()
        micro_batch = next(remaining, None)
        if micro_batch is None:
            return None
        ring.open(kept=keep)
        sent = moved(micro_batch, device, ring)
        return _Sent(sent, ring.close())

    try:
        following = send_next()
        while following is not None:
            sent = following
            # The slot of the one before is free again: nobody here holds that any more.
            following = send_next()
            ring.wait_for(sent.ticket)
            yield Arrival(sent.micro_batch, is_last=following is None)
    finally:
        ring.join()


class _Sent(NamedTuple):
    micro_batch: MicroBatch
    ticket: int


def moved(micro_batch: MicroBatch, device: torch.device, ring: Ring | None = None) -> MicroBatch:
    """A micro-batch as the model sees it: all leaves with samples are tensors, and on ``device``."""

    borrowed = False

    def move(leaf: Any) -> Any:
        nonlocal borrowed
        if ring is not None and ring.takes(leaf):
            borrowed |= device.type == "cpu"
            return ring.send(leaf)
        if isinstance(leaf, (np.ndarray, Rows)):
            leaf = as_tensor(leaf)
        if not isinstance(leaf, Tensor) or leaf.device == device:
            borrowed |= isinstance(leaf, Tensor)
            return leaf
        return leaf.to(device)

    inputs, targets = (
        pytree.tree_map(move, tree) for tree in (micro_batch.inputs, micro_batch.targets)
    )
    return MicroBatch(inputs, targets, micro_batch.samples, borrowed=borrowed)
