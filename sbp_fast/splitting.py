"""Where a large batch is cut into micro-batches: by samples or by cost, and as finely as memory asks."""

from __future__ import annotations

import math
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from numbers import Real
from typing import Any

from torch import Tensor

from .batches import MicroBatch, PyTree, begun, cut, is_stream, part_of, split, split_stream
from .loss import Shares
from .memory.micro_batch_size import MicroBatchSize

Cost = Callable[[PyTree], "float | Tensor"]


class Splitting:
    """The sizes of one accumulator's micro-batches.

    Args:
        loss_fn: there are targets if there is one.
        cost: what a micro-batch costs, of its inputs: tokens, say. More samples never cost less.
    """

    def __init__(
        self,
        loss_fn: Callable[..., Any] | None,
        cost: Cost | None = None,
    ) -> None:
        self._with_targets = loss_fn is not None
        self._size = MicroBatchSize(1)
        self._cost = cost

    def split(
        self,
        inputs: PyTree | Iterable[Any],
        targets: PyTree,
        shares: Shares,
        size_for: Callable[[MicroBatch], int],
    ) -> Iterable[MicroBatch]:
        """The micro-batches of a large batch: a list, or a generator if it comes as a stream.

        Args:
            shares: learn of the micro-batches, if all are there.
            size_for: the most that is computed at once of a large batch, or of one item of a stream:
                samples, or their cost.

        Raises:
            ValueError: see :meth:`sbp_fast.StreamedAccumulator.step`.
        """
        if is_stream(inputs):
            if targets is not None:
                raise ValueError(
                    "targets were given beside an iterable of micro-batches; let the iterable yield "
                    "pairs (inputs, targets)"
                )
            items = split_stream(inputs, sys.maxsize, with_targets=self._with_targets)
            # What becomes of activations is decided at the first, before any is computed.
            return begun(piece for item in items for piece in self._cut_anew(item, size_for(item)))
        (whole,) = split(inputs, targets, sys.maxsize, with_targets=self._with_targets)
        micro_batches = self._cut_anew(whole, size_for(whole))
        shares.announce(micro_batches)
        return micro_batches

    def pieces_of(self, micro_batch: MicroBatch) -> list[MicroBatch]:
        """Those that memory allows, since it was cut."""
        if self._cost is None:
            return cut(micro_batch, int(self._size.current))
        return self._cut_by_cost(micro_batch) if self._size.is_reduced else [micro_batch]

    def shrink(self, micro_batches: Sequence[MicroBatch], reason: BaseException) -> None:
        """Memory did not suffice for one of these, of which some have more than one sample."""
        sizes = [self._size_of(piece) for piece in micro_batches if piece.samples > 1]
        self._size.shrink(max(sizes), reason)

    def end_step(self) -> None:
        """A step has gone well."""
        self._size.end_step()

    def _cut_anew(self, whole: MicroBatch, wanted: int) -> list[MicroBatch]:
        self._size.want(wanted)
        if self._cost is None:
            return cut(whole, int(self._size.current))
        return self._cut_by_cost(whole)

    def _cut_by_cost(self, whole: MicroBatch) -> list[MicroBatch]:
        pieces, start = [], 0
        while start < whole.samples:
            # Only a length that was found to be within the bound is taken, whatever others cost.
            length = bisect_right(
                range(1, whole.samples - start + 1),
                self._size.current,
                key=lambda length: self._size_of(part_of(whole, start, start + length)),
            )
            if length == 0:
                self._check_single(whole, start)
                length = 1
            pieces.append(part_of(whole, start, start + length))
            start += length
        return pieces

    def _check_single(self, whole: MicroBatch, position: int) -> None:
        """A sample that is too much by itself: of what was wanted, or only since memory is short?"""
        cost = self._size_of(part_of(whole, position, position + 1))
        if cost > self._size.wanted:
            raise ValueError(
                f"sample {position} alone has a micro_batch_cost of {cost:.10g}, and micro_batch_size "
                f"allows {self._size.wanted} at once; raise it, or shorten or leave out that sample"
            )

    def _size_of(self, micro_batch: MicroBatch) -> float:
        if self._cost is None:
            return micro_batch.samples
        cost = self._cost(micro_batch.inputs)
        if isinstance(cost, Tensor) and cost.numel() == 1:
            cost = cost.item()
        if isinstance(cost, bool) or not isinstance(cost, Real) or not 0 < float(cost) < math.inf:
            raise ValueError(
                f"micro_batch_cost returned {cost!r} for {micro_batch.samples} samples; it must be a "
                "number greater than 0, what they cost together (their tokens, say)"
            )
        return float(cost)
