"""The micro-batch size with the shortest step.

Ravi Kumar and Sivakumar 2025, section 3, leave the optimal micro-batch size to a search. For a step of
``ceil(B / mu)`` micro-batches that take ``alpha + beta * mu`` each, there is nothing to search for.
"""

from __future__ import annotations

import math

# Samples from which on a micro-batch's fixed costs are no more than a forward pass: a third of the time
# of its samples, whose backward pass takes twice as long. It is assumed where nothing was timed.
ENOUGH_SAMPLES = 8
_FORWARD = 1 / 3


def best_micro_batch_size(
    batch_size: int, largest: int, alpha: float | None = None, beta: float | None = None
) -> int:
    """The ``mu`` from 1 to ``largest`` with the least ``T(mu) = ceil(B / mu) * (alpha + beta * mu)``.

    Among equals it is the one with the fewest micro-batches, and among those the smallest: it needs the
    least memory. Where nothing is known of ``alpha`` and ``beta``, the fewest micro-batches are best.

    Args:
        batch_size: ``B``, samples in the large batch.
        largest: the largest micro-batch that fits; more than ``batch_size`` counts as that.
        alpha: seconds that a micro-batch takes whatever its size; None where it was not measured.
        beta: seconds that each of its samples adds; None where it was not measured.

    Raises:
        ValueError: a size below 1, a negative time, or one time without the other.
    """
    for name, size in (("batch_size", batch_size), ("largest", largest)):
        if size < 1:
            raise ValueError(f"{name} is {size}; it must be at least 1, a number of samples")
    largest = min(largest, batch_size)
    fewest = _ceil(batch_size, largest)
    if alpha is None and beta is None:
        return _ceil(batch_size, fewest)
    if alpha is None or beta is None:
        raise ValueError(
            f"alpha is {alpha} and beta is {beta}; both are measured together: give both, or neither"
        )
    for name, seconds in (("alpha", alpha), ("beta", beta)):
        if not 0.0 <= seconds < math.inf:
            raise ValueError(f"{name} is {seconds}; it must be a finite time of at least 0 seconds")
    best, shortest = 0, math.inf
    for size in even_sizes(batch_size):
        count = _ceil(batch_size, size)
        if count >= fewest and count * (alpha + beta * size) < shortest:
            best, shortest = size, count * (alpha + beta * size)
    return best


def relative_step_time(batch_size: int, size: int, more: float) -> float:
    """``ceil(B / mu) * (alpha + beta * mu) * (1 + more)`` in units of ``beta``, with ``alpha`` such that
    :data:`ENOUGH_SAMPLES` are enough.

    Args:
        batch_size, size: ``B`` and ``mu``.
        more: what a policy adds to a micro-batch's time, as a part of it. Computing blocks again adds
            their share of a forward pass (:func:`time_of_recomputation`).
    """
    return _ceil(batch_size, size) * (ENOUGH_SAMPLES * _FORWARD + size) * (1.0 + more)


def time_of_recomputation(share: float) -> float:
    """What a part of the forward pass, done again, adds to a step: as a part of its time."""
    return share * _FORWARD


def even_sizes(batch_size: int) -> list[int]:
    """The smallest micro-batch size for every number of micro-batches there can be, largest first."""
    sizes, size = [], batch_size
    while size > 0:
        size = _ceil(batch_size, _ceil(batch_size, size))
        sizes.append(size)
        size -= 1
    return sizes


def _ceil(samples: int, size: int) -> int:
    return -(-samples // size)
