"""The arguments of verify: checked before anything runs, with errors that name the value and the cure."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

from ..accumulator import StreamedAccumulator
from ..batches import MicroBatch, PyTree, is_stream, split

# Options of the accumulator that verify has no use for: what to do instead.
_NOT_HERE = {
    "micro_batch_size": "pass all of them as micro_batch_sizes",
    "max_grad_norm": "leave it out: gradients are compared as they are before clipping",
    "grad_scaler": "leave it out: gradients are compared as they are without scaling",
}


def check_options(options: Mapping[str, Any]) -> None:
    """Raises TypeError for what is no option of the accumulator, or none that concerns gradients."""
    signature = inspect.signature(StreamedAccumulator)
    known = [
        name
        for name, parameter in signature.parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and name not in _NOT_HERE
    ]
    for name in options:
        if name in _NOT_HERE:
            raise TypeError(f"{name} is no option of verify; {_NOT_HERE[name]}")
        if name not in known:
            raise TypeError(
                f"{name!r} is no option of verify; those of the accumulator are {', '.join(known)}"
            )


def first_samples(
    inputs: PyTree, targets: PyTree, samples: int | None, *, with_targets: bool
) -> MicroBatch:
    """The first ``samples`` of the batch, or all of it, as one piece.

    Raises:
        TypeError: the batch is a stream, or ``samples`` no int.
        ValueError: the batch cannot be split, or does not have so many samples.
    """
    if is_stream(inputs):
        raise TypeError(
            f"inputs are a {type(inputs).__name__}, a stream that can be read once, but verify needs the "
            "batch for every micro-batch size; pass tensors (one item of a loader: next(iter(loader)))"
        )
    if samples is not None and (isinstance(samples, bool) or not isinstance(samples, int)):
        raise TypeError(f"samples is {samples!r}; it must be an int, or None for the whole batch")
    whole = split(inputs, targets, sys.maxsize, with_targets=with_targets)[0]
    if samples is None:
        return whole
    if not 1 <= samples <= whole.samples:
        raise ValueError(
            f"samples is {samples}; it must be from 1 to {whole.samples}, the samples of the batch, or "
            "None for all"
        )
    return split(inputs, targets, samples, with_targets=with_targets)[0]


def check_sizes(sizes: Any, samples: int) -> list[int]:
    """The micro-batch sizes, in their order.

    Raises:
        TypeError: no iterable of ints.
        ValueError: there is none, or one that is not from 1 to ``samples``.
    """
    if isinstance(sizes, (str, bytes)) or not isinstance(sizes, Iterable):
        raise TypeError(
            f"micro_batch_sizes is {sizes!r}; it must be a sequence of ints such as (1, 3), or None for "
            "a usual choice"
        )
    listed: list[int] = list(sizes)
    if not listed:
        raise ValueError(
            "micro_batch_sizes is empty; give at least one, or None for a usual choice"
        )
    for size in listed:
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"micro_batch_sizes holds {size!r}; it must hold ints, in samples")
        if not 1 <= size <= samples:
            raise ValueError(
                f"micro_batch_sizes holds {size}; each must be from 1 to {samples}, the samples that are "
                "compared: leave it out, or pass a larger batch"
            )
    return listed


def usual_sizes(samples: int) -> list[int]:
    """One sample, a size below half that leaves a smaller last piece, and the whole batch."""
    uneven = [size for size in range(2, samples) if samples % size]
    middle = [size for size in uneven if size <= samples // 2][-1:] or uneven[:1]
    return sorted({1, *middle, samples})


def check_seed(seed: Any) -> None:
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed is {seed!r}; it must be an int")


def check_tolerance(tolerance: Any) -> None:
    """Raises TypeError or ValueError for what is no relative error."""
    if isinstance(tolerance, bool) or not isinstance(tolerance, Real):
        raise TypeError(
            f"tolerance is {tolerance!r}; it must be a number, the largest relative error, or None for "
            "the usual one"
        )
    if not 0.0 < float(tolerance) < math.inf:
        raise ValueError(
            f"tolerance is {tolerance}; it must be a finite number greater than 0, or None for the usual "
            "one"
        )
