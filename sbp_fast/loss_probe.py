"""Is the loss what it was declared to be? A few samples at once against the same samples in two parts.

A wrong declaration is silent otherwise: the gradient is that of another loss.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .batches import MicroBatch, PyTree, copied, has_samples, rows
from .forward import Forward
from .loss import DENOMINATORS, LossContract, Weigh, describe_loss
from .parameters import modules_of
from .rehearsal import Rehearsal

_log = logging.getLogger("sbp_fast")

# How far parts may be from the whole, relative to the loss, by the bytes of the narrowest number in it.
# A wrong denominator is off by the spread of the weights times that of the losses, which is small in a
# model that has learnt nothing yet: so the bounds are no wider than rounding demands. A loss that comes
# in float64 may have gone through float32 on its way; one in float32 may come from convolutions that
# take another algorithm for another number of samples.
_TOLERANCES = {8: 1e-5, 4: 1e-3}
_TOLERANCE_16_BIT = 3e-2


def probe_loss(
    contract: LossContract, forward: Forward, samples: MicroBatch, device: torch.device
) -> None:
    """Compares the loss of some samples with what the contract makes of the losses of two parts.

    Where the outputs of one forward can be sliced, it is the loss alone that is computed several times,
    in float64 if it takes that. Otherwise the model runs on the parts as well, without autocast and in
    eval mode: dropout and batch norm would make a difference of their own. Nothing is compared, and the
    reason is logged, where user code raises (the step will say so itself), draws random numbers, or
    gives a loss that is zero, not finite, or another one each time. Leaves no trace (see
    :class:`Rehearsal`).

    Args:
        samples: at least two, on ``device``.

    Raises:
        ValueError: a declared contract does not fit; the message says which normalization would.
    """
    if contract.declared is None:
        return
    reason = ""
    with Rehearsal(modules_of(forward.model, forward.loss_fn), device) as rehearsal:
        for prepare in _WAYS:
            try:
                way = prepare(forward, samples, rehearsal)
                figures = _measure(way, samples, rehearsal, device)
                agree = figures.agree(contract.weigh)
                break
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
        else:
            _log.info("the loss is not probed: %s", reason)
            return
    if agree:
        return
    fitting = [name for name, weigh in DENOMINATORS.items() if figures.fit(weigh)]
    if fitting or figures.are_finite():
        raise ValueError(_complaint(contract, forward, figures, fitting))
    _log.info("the loss is not probed: that of a part of the samples is not finite")


@dataclass(frozen=True)
class _Way:
    """A way to the loss of the samples from a first one up to a last one, which is left out.

    ``operands``: tensors whose rounding makes a difference between the whole and its parts.
    """

    loss_of: Callable[[int, int], Any]
    operands: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class _Part:
    samples: MicroBatch
    loss: float


@dataclass(frozen=True)
class _Figures:
    """The loss of some samples at once, those of two parts of them, and how close they must be."""

    whole: float
    parts: tuple[_Part, _Part]
    tolerance: float

    def agree(self, weigh: Weigh | None) -> bool:
        total, size = self.add_up(weigh)
        return abs(total - self.whole) <= self.tolerance * max(size, abs(self.whole))

    def fit(self, weigh: Weigh | None) -> bool:
        """The same for a normalization that was not declared and may not apply to such targets."""
        try:
            return self.agree(weigh)
        except ValueError:
            return False

    def are_finite(self) -> bool:
        return all(math.isfinite(part.loss) for part in self.parts)

    def add_up(self, weigh: Weigh | None) -> tuple[float, float]:
        """The loss as the accumulator would add it up, and its size: the same without signs, since
        losses of either sign may cancel."""
        weights = [1.0 if weigh is None else float(weigh(part.samples)) for part in self.parts]
        # Like the accumulator, without parts that weigh nothing: their loss may be NaN.
        terms = [w * part.loss for w, part in zip(weights, self.parts, strict=True) if w > 0]
        if not terms:
            raise ValueError("the first samples weigh nothing")
        divisor = 1.0 if weigh is None else sum(weights)
        return sum(terms) / divisor, sum(map(abs, terms)) / divisor


def _slice_outputs(
    dtype: torch.dtype, forward: Forward, samples: MicroBatch, rehearsal: Rehearsal
) -> _Way:
    """Losses of slices of one forward's outputs, which are converted to ``dtype`` or wider."""
    if forward.loss_fn is None:
        raise TypeError("the model returns its own loss, not outputs to slice")
    count = samples.samples
    with forward.autocast():
        outputs = forward.call_model(copied(samples.inputs))
        fewer = forward.call_model(copied(rows(samples.inputs, 0, count - 1)))
    if not (_has_samples_first(outputs, count) and _has_samples_first(fewer, count - 1)):
        raise TypeError("not all outputs are tensors with one entry per sample")
    outputs = pytree.tree_map(lambda leaf: _widened(leaf, dtype), outputs)

    def loss_of(start: int, stop: int) -> Any:
        return forward.call_loss(
            copied(rows(outputs, start, stop)), copied(rows(samples.targets, start, stop))
        )

    return _Way(loss_of)


def _run_model(forward: Forward, samples: MicroBatch, rehearsal: Rehearsal) -> _Way:
    """Losses of runs on the samples themselves."""
    rehearsal.switch_to_eval()

    def loss_of(start: int, stop: int) -> Any:
        outputs = forward.call_model(copied(rows(samples.inputs, start, stop)))
        return forward.call_loss(outputs, copied(rows(samples.targets, start, stop)))

    return _Way(loss_of, operands=tuple(forward.model.parameters()))


# From the most to the least exact; the first that user code goes along with decides.
_WAYS: tuple[Callable[[Forward, MicroBatch, Rehearsal], _Way], ...] = (
    functools.partial(_slice_outputs, torch.float64),
    functools.partial(_slice_outputs, torch.float32),
    _run_model,
)


def _has_samples_first(outputs: PyTree, samples: int) -> bool:
    leaves = pytree.tree_leaves(outputs)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    return (
        bool(tensors)
        and all(has_samples(tensor) and len(tensor) == samples for tensor in tensors)
        # Anything else may hold tensors that nobody sees.
        and all(isinstance(leaf, (Tensor, bool, int, float, str, type(None))) for leaf in leaves)
    )


def _widened(leaf: Any, dtype: torch.dtype) -> Any:
    if isinstance(leaf, Tensor) and leaf.is_floating_point():
        return leaf.to(torch.promote_types(leaf.dtype, dtype))
    return leaf


def _measure(
    way: _Way, samples: MicroBatch, rehearsal: Rehearsal, device: torch.device
) -> _Figures:
    def run(start: int, stop: int) -> Tensor:
        rehearsal.start_over()
        with torch.autocast(device.type, enabled=False):
            loss = way.loss_of(start, stop)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise TypeError("the loss is no scalar")
        return loss

    count = samples.samples
    cut = max(1, (count - 1) // 2)
    at_once = run(0, count)
    if rehearsal.has_drawn():
        raise ValueError("random numbers are drawn on the way to the loss")
    losses = at_once, run(0, cut), run(cut, count), run(0, count)
    whole, first, second, again = map(float, losses)
    tolerance = max(map(_tolerance, (*losses, *way.operands)))
    if not math.isfinite(whole):
        raise ValueError(f"the loss is {whole}")
    if whole == first == second == 0.0:
        raise ValueError("the loss is 0")
    if not abs(again - whole) <= tolerance * abs(whole):
        raise ValueError("the same samples have another loss each time")
    parts = _Part(_cut(samples, 0, cut), first), _Part(_cut(samples, cut, count), second)
    return _Figures(whole, parts, tolerance)


def _tolerance(tensor: Tensor) -> float:
    if not tensor.is_floating_point():
        return 0.0
    return _TOLERANCES.get(tensor.itemsize, _TOLERANCE_16_BIT)


def _cut(samples: MicroBatch, start: int, stop: int) -> MicroBatch:
    inputs, targets = (rows(tree, start, stop) for tree in (samples.inputs, samples.targets))
    return MicroBatch(inputs, targets, stop - start)


def _complaint(
    contract: LossContract, forward: Forward, figures: _Figures, fitting: list[str]
) -> str:
    sizes = [part.samples.samples for part in figures.parts]
    total, _ = figures.add_up(contract.weigh)
    if not fitting:
        cure = (
            "no other one fits: either the loss compares samples with one another (contrastive losses; "
            "pass cross_sample_loss=True), or it divides by something of its own (pass a callable that "
            "returns it for a micro-batch's targets)"
        )
    else:
        cure = "pass normalization=" + " or ".join(map(repr, fitting))
        if len(fitting) > 1:
            cure += ", which are the same for these samples"
        if contract.inverse_sqrt:
            cure = (
                "it takes a loss that cannot be read for a mean over samples; make it one, or "
                f"{cure}, without the square root"
            )
    return (
        f"{contract.declared} does not fit {describe_loss(forward.loss_fn)}: the first {sum(sizes)} "
        f"samples have the loss {figures.whole:.6g} at once, but {total:.6g} when it is added up from "
        f"{sizes[0]} + {sizes[1]} of them as declared; {cure}. If the declaration is right, pass "
        "probe=False"
    )
