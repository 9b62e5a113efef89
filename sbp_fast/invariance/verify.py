"""The equivalence certificate: is the micro-batch size a pure performance knob for this model?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from ..batches import PyTree
from ..certificate import Certificate, ParameterError, TotalError
from ..certificate.arguments import (
    check_options,
    check_seed,
    check_sizes,
    check_tolerance,
    first_samples,
    usual_sizes,
)
from ..certificate.copies import Copies, left_alone
from ..certificate.distance import Distance, Oracle
from ..certificate.environment import computes_in, describe, device_for_double
from ..certificate.random_state import given_back
from ..certificate.tolerance import tolerance_of_each, usual_tolerance
from ..certificate.ways import Run, Ways
from ..options import check_gradients_possible, check_loss_fn, check_model


def verify(
    model: nn.Module,
    loss_fn: Callable[..., Any] | None,
    inputs: PyTree,
    targets: PyTree = None,
    micro_batch_sizes: Iterable[int] | None = None,
    *,
    samples: int | None = None,
    tolerance: float | None = None,
    seed: int = 0,
    **options: Any,
) -> Certificate:
    """Compares streamed gradients with the whole batch's, parameter by parameter.

    The oracle is plain PyTorch on a float64 copy of the model: the whole batch at once, one forward pass,
    one backward pass. Against it stand, for every micro-batch size, :meth:`StreamedAccumulator.backward`
    and *plain accumulation*: the usual loop, in which each micro-batch's loss, times its part of the
    samples, is backpropagated and everything else is torch's own. Both compute in the model's own dtype.

    Where the model draws random numbers (dropout), torch would give every split, and float64, others. The
    oracle is then the accumulator itself with one micro-batch, in float64 and from the same seed.

    Everything is computed on copies: parameters, buffers, ``p.grad``, mode and the states of random
    generators are afterwards as before. Hooks on parameters are not copied.

    Args:
        model, loss_fn, inputs, targets: as for :class:`StreamedAccumulator`, but no stream: the batch is
            needed several times.
        micro_batch_sizes: in samples, at most the batch's; None for 1, one that leaves a smaller last
            piece, and the whole.
        samples: only the first so many of the batch are used; None for all. If they do not fit in memory
            at once, half as many are, until they fit; ``samples_asked`` of the certificate tells.
        tolerance: the largest relative error of a parameter's gradient that is put down to rounding. None
            for 1e-12 in float64, 1e-5 in float32, 5e-2 in 16 bits, and beyond that for four times the
            error of the whole batch at once in the model's own dtype: that is rounding alone, unless it
            is too much.
        seed: that every run begins from.
        options: of :class:`StreamedAccumulator`, beside ``micro_batch_size``, ``max_grad_norm`` and
            ``grad_scaler``.

    Raises:
        TypeError, ValueError: an argument is not what it must be, before anything runs; or the model
            cannot be copied, or not be computed in float64. The message names it and the cure.
        NotImplementedError: an option that is not available yet.

    An exception that only a split causes is not raised: it is a finding, and in the certificate.
    """
    check_gradients_possible()
    check_model(model)
    check_loss_fn(loss_fn)
    check_options(options)
    check_seed(seed)
    batch = first_samples(inputs, targets, samples, with_targets=loss_fn is not None)
    if micro_batch_sizes is not None:
        micro_batch_sizes = check_sizes(micro_batch_sizes, batch.samples)
    if tolerance is not None:
        check_tolerance(tolerance)
    originals = Copies(model, loss_fn)
    device = next(iter(originals.trainable.values())).device
    ways = Ways(originals, batch, options, seed, device, device_for_double(device))
    ways.check()
    dtypes = computes_in(originals, device, options.get("autocast"))

    with left_alone(originals.parameters), given_back(device):
        ways, at_once, exact = _whole_batch(ways)
        oracle = Oracle(exact.gradients)
        rounding = oracle.distance(at_once.gradients)
        compared = ways.batch.samples
        sizes = _up_to(compared, micro_batch_sizes or usual_sizes(compared))
        streamed = [_attempt(ways.streamed, size, oracle) for size in sizes]
        plain = [_attempt(ways.accumulated, size, oracle) for size in sizes]

    if tolerance is None:
        tolerance = usual_tolerance(dtypes)
        tolerances = tolerance_of_each(tolerance, rounding, dtypes)
    else:
        tolerances = dict.fromkeys(oracle.norms, tolerance)
    return Certificate(
        rows=tuple(
            ParameterError(size, name, ours.of[name], theirs.of[name], tolerances[name], norm)
            for name, norm in oracle.norms.items()
            for size, (ours, _), (theirs, _) in zip(sizes, streamed, plain, strict=True)
        ),
        totals=tuple(
            TotalError(size, ours.total, theirs.total, failure, plain_failure)
            for size, (ours, failure), (theirs, plain_failure) in zip(
                sizes, streamed, plain, strict=True
            )
        ),
        tolerance=tolerance,
        rounding=rounding.total,
        samples=compared,
        samples_asked=batch.samples,
        oracle=_oracle_in_words(ways, exact),
        environment=describe(device, dtypes, seed, options),
    )


def _oracle_way(ways: Ways, at_once: Run) -> Callable[..., Run]:
    """How the whole batch is computed at once: as ``at_once`` was, unless that drew random numbers, which
    only the accumulator draws alike in every dtype and for every split."""
    return ways.streamed if at_once.drew else ways.accumulated


def _whole_batch(ways: Ways) -> tuple[Ways, Run, Run]:
    """The whole batch at once, in the model's own dtype and in float64; of less of it, until it fits."""
    while True:
        try:
            return ways, *_at_once(ways)
        except Exception as error:
            if not _is_out_of_memory(error) or ways.batch.samples == 1:
                raise
        # Outside: the exception holds all that was computed.
        ways = ways.of_the_first(ways.batch.samples // 2)


def _at_once(ways: Ways) -> tuple[Run, Run]:
    everything = ways.batch.samples
    own = ways.accumulated(everything)
    way = _oracle_way(ways, own)
    if own.drew:
        own = way(everything)
    try:
        return own, way(everything, double=True)
    except Exception as error:
        if _is_out_of_memory(error):
            raise
        raise ValueError(
            f"the model cannot be computed in float64 ({type(error).__name__}: {error}), which is what "
            "it is verified against; let what it makes in forward() follow its inputs' dtype, and "
            "register tensors that it or its loss holds as buffers, so that .double() reaches them"
        ) from error


def _attempt(
    way: Callable[[int], Run], micro_batch_size: int, oracle: Oracle
) -> tuple[Distance, str]:
    """How far a way is from the oracle, or why it has not come anywhere.

    The whole batch computes: what the same model raises on a part of it is a finding.
    """
    try:
        return oracle.distance(way(micro_batch_size).gradients), ""
    except Exception as error:
        if _is_out_of_memory(error):
            raise
        return oracle.infinitely_far(), f"{type(error).__name__}: {' '.join(str(error).split())}"


def _up_to(samples: int, sizes: Sequence[int]) -> list[int]:
    """The sizes, in order and each once, where fewer samples than asked for are compared."""
    return list(dict.fromkeys(min(size, samples) for size in sizes))


def _oracle_in_words(ways: Ways, exact: Run) -> str:
    how = (
        "the accumulator with one micro-batch and the same random numbers"
        if exact.drew
        else "plain PyTorch"
    )
    return f"the whole batch at once, by {how}, in float64 on {ways.double_device}"


def _is_out_of_memory(error: Exception) -> bool:
    """On the CPU, torch has no type of its own for it."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
