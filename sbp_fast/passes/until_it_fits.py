"""Passes in which all micro-batches depend on one another: where memory runs out, all begin again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from torch import Tensor
from torch.utils import _pytree as pytree

from ..batches import MicroBatch
from ..memory.out_of_memory import NothingSmallerError, is_out_of_memory, release
from ..splitting import Splitting
from ..streaming import Arrival
from .computation import Computation

Compute = Callable[[Iterable[MicroBatch], Computation], None]


def compute_until_it_fits(
    arrivals: Iterable[Arrival],
    begin: Callable[[], Computation],
    compute: Compute,
    start_over: Callable[[], None],
    splitting: Splitting,
) -> Computation:
    """Computes the large batch, each time with half the micro-batches' size, until memory suffices.

    Args:
        arrivals: of the large batch. All of its micro-batches stay on the device anyway.
        begin: makes an attempt's computation.
        start_over: puts back what an attempt has changed.
        splitting: what memory allows at once; learns where it allows less.

    Returns:
        The computation that went well.

    Raises:
        NothingSmallerError: memory runs out, and smaller micro-batches would not help.
    """
    arrived = _Arrived(arrivals)
    while True:
        computation = begin()
        try:
            compute(arrived.in_pieces_by(splitting), computation)
            return computation
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if arrived.are_single_samples():
                raise NothingSmallerError(
                    f"out of memory with a single sample at once: {error}"
                ) from error
            if arrived.were_written_to():
                raise NothingSmallerError(
                    "out of memory, and the model has written to its inputs, or the loss to its targets, "
                    f"so that they cannot be computed again; let them copy what they change: {error}"
                ) from error
            failure = error
        splitting.shrink(arrived.pieces(), failure)
        device = computation.device
        del computation
        release(failure, device)
        start_over()


class _Arrived:
    """Micro-batches as they come from the stream; those that have come, in pieces of another size."""

    def __init__(self, arrivals: Iterable[Arrival]) -> None:
        self._coming = iter(arrivals)
        self._kept: list[MicroBatch] = []
        self._handed_out: list[tuple[MicroBatch, list[int]]] = []

    def in_pieces_by(self, splitting: Splitting) -> Iterator[MicroBatch]:
        self._handed_out = []
        for micro_batch in self._all():
            for piece in map(_written_to_apart, splitting.pieces_of(micro_batch)):
                self._handed_out.append((piece, piece.versions()))
                yield piece

    def _all(self) -> Iterator[MicroBatch]:
        yield from list(self._kept)
        while True:
            try:
                arrival = next(self._coming)
            except StopIteration:
                return
            except Exception as error:
                # A stream that has failed has ended, and what it was about to bring is lost.
                if is_out_of_memory(error):
                    raise NothingSmallerError(
                        f"out of memory while a micro-batch came to the device: {error}"
                    ) from error
                raise
            self._kept.append(arrival.micro_batch)
            yield arrival.micro_batch

    def pieces(self) -> list[MicroBatch]:
        return [piece for piece, _ in self._handed_out]

    def are_single_samples(self) -> bool:
        return all(piece.samples == 1 for piece in self.pieces())

    def were_written_to(self) -> bool:
        return any(piece.versions() != versions for piece, versions in self._handed_out)


def _written_to_apart(micro_batch: MicroBatch) -> MicroBatch:
    """Rows of one tensor count what is written to any of them, so that a model that writes to its inputs
    would seem to have changed those that another micro-batch goes back through."""

    def set_apart(leaf: Tensor) -> Tensor:
        return leaf if leaf.requires_grad else leaf.data

    inputs, targets = (
        pytree.tree_map_only(Tensor, set_apart, tree)
        for tree in (micro_batch.inputs, micro_batch.targets)
    )
    return replace(micro_batch, inputs=inputs, targets=targets)
