"""Each micro-batch forward and backward before the next: nothing of it is kept.

Where memory runs out in one of them, it is computed again in two halves. What its backward pass had got
done by then stays: a parameter's gradient arrives whole or not at all, and the halves leave out those
that are in.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch

from ..batches import MicroBatch, cut
from ..buffers import Buffers
from ..loss import Weight
from ..memory.out_of_memory import NothingSmallerError, is_out_of_memory, release
from ..splitting import Splitting
from ..streaming import Arrival
from .computation import Computation, is_nothing
from .reentrant import arrives_in_parts


def compute_one_by_one(
    arrivals: Iterable[Arrival],
    computation: Computation,
    splitting: Splitting,
    at_beginning: Buffers,
    later: Buffers,
) -> None:
    """Runs every micro-batch with its share of the large batch.

    Args:
        splitting: what memory allows at once; learns where it allows less.
        at_beginning: a copy of the modules' buffers as they are now.
        later: where they are copied before each further attempt.

    Raises:
        NothingSmallerError: memory runs out, and a smaller micro-batch would not help.
    """
    for arrival in arrivals:
        _compute_in_pieces(arrival, computation, splitting, at_beginning, later)
        # Its memory is wanted for the next one, which is sent before the loop comes round.
        del arrival


@dataclass(frozen=True)
class _Piece:
    """Of a micro-batch: its samples, its share of the loss, and whose gradients it leaves out."""

    micro_batch: MicroBatch
    first_sample: int
    share: Weight
    left_out: frozenset[int] = frozenset()


def _compute_in_pieces(
    arrival: Arrival,
    computation: Computation,
    splitting: Splitting,
    at_beginning: Buffers,
    later: Buffers,
) -> None:
    large_batch = computation.large_batch
    first_sample, share = computation.take_share(arrival.micro_batch)
    whole = _Piece(arrival.micro_batch, first_sample, share)
    pieces = _divided(whole, splitting.pieces_of(whole.micro_batch), computation)
    while pieces:
        piece = pieces.pop(0)
        large_batch.accumulators.observe(arrival.is_last and not pieces)
        if not is_nothing(piece.share):
            buffers = at_beginning
            if large_batch.micro_batches > 0:
                buffers = later
                buffers.copy()
            loss = large_batch.loss
            failure = _attempt(piece, computation)
            if failure is not None:
                # 1. What the piece has changed: back, but for the gradients that are wholly in.
                release(failure, computation.device)
                large_batch.loss = loss
                buffers.put_back()
                # 2. The same samples again, half as many at once.
                splitting.shrink([piece.micro_batch], failure)
                rest = replace(piece, left_out=piece.left_out | large_batch.accumulators.arrived)
                halves = cut(piece.micro_batch, (piece.micro_batch.samples + 1) // 2)
                pieces[:0] = _divided(rest, halves, computation)
                continue
        large_batch.count(piece.micro_batch.samples)


def _divided(piece: _Piece, parts: Sequence[MicroBatch], computation: Computation) -> list[_Piece]:
    """The same in several parts, each with its share."""
    if len(parts) == 1:
        return [piece]
    shares = computation.large_batch.shares.divide(piece.share, parts)
    firsts = accumulate((part.samples for part in parts[:-1]), initial=piece.first_sample)
    return [
        _Piece(part, first, share, piece.left_out)
        for part, first, share in zip(parts, firsts, shares, strict=True)
    ]


def _attempt(piece: _Piece, computation: Computation) -> BaseException | None:
    """Computes a piece. Returns the error where memory ran out and a smaller piece may do."""
    versions = piece.micro_batch.versions()
    computation.large_batch.accumulators.begin_micro_batch()
    try:
        _compute(piece, computation)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        if piece.micro_batch.samples == 1:
            raise NothingSmallerError(f"out of memory with a single sample: {error}") from error
        if piece.micro_batch.versions() != versions:
            raise NothingSmallerError(
                "out of memory, and the model has written to its inputs, or the loss to its targets, so "
                f"that they cannot be computed again; let them copy what they change: {error}"
            ) from error
        return error
    return None


def _compute(piece: _Piece, computation: Computation) -> None:
    forward, micro_batch = computation.forward, piece.micro_batch
    computation.sampling.begin(piece.first_sample, micro_batch.samples)
    loss = forward.loss(forward.outputs(micro_batch.inputs), micro_batch.targets)
    loss = computation.large_batch.add_loss(loss, piece.share)
    # A share seeds the backward pass, so that gradients arrive ready to be kept. A loss in 16 bits
    # would round it: then it scales the gradients as they are added, in the accumulators' precision
    # (a share on the device must be read for that).
    narrow = loss.dtype in (torch.bfloat16, torch.float16)
    scale, seed = (float(piece.share), 1.0) if narrow else (1.0, piece.share)
    with computation.collecting(scale, piece.left_out):
        try:
            computation.run_back(computation.roots(loss, seed))
        except Exception as error:
            if is_out_of_memory(error) and arrives_in_parts(loss):
                raise NothingSmallerError(
                    "out of memory in the backward pass of a reentrant checkpoint, of whose gradients a "
                    "part may be in; pass use_reentrant=False to torch.utils.checkpoint, or choose a "
                    f"smaller micro_batch_size: {error}"
                ) from error
            raise
    computation.sampling.end()
