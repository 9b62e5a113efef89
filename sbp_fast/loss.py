"""Who divides by what: how the losses of micro-batches add up to the loss of the large batch.

A loss that averages divides by its own denominator ``W_i`` (samples, elements, tokens, class weights).
The large batch would divide once, by ``W = sum of W_i``. So micro-batch ``i`` counts with the share
``W_i / W``: exact for uneven pieces and ragged tokens, where dividing by the number of micro-batches is
not. A loss that sums needs no division at all.

The paper's own scaling (Ravi Kumar and Sivakumar 2025, section 4, "Loss Normalization Algorithm"),
``Loss / sqrt(B)``, is the normalization ``"inverse_sqrt"``: the large batch's loss, as its ``loss_fn``
defines it, over the square root of its number of samples.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from .batches import MicroBatch, PyTree, as_tensor, gathered
from .data.rows import Rows

NORMALIZATIONS = ("auto", "mean", "tokens", "sum", "inverse_sqrt")
IGNORE_INDEX = -100

Weight = float | Tensor
Weigh = Callable[[MicroBatch], Weight]


@dataclass(frozen=True)
class LossContract:
    """What is known of the loss.

    ``weigh`` gives a micro-batch's denominator, or is None where the loss sums. ``inverse_sqrt`` asks for
    the paper's extra division. ``elementwise`` losses pair outputs and targets element by element.
    ``declared`` is what errors call a normalization that was declared; None where the loss was read.
    """

    weigh: Weigh | None
    inverse_sqrt: bool = False
    elementwise: bool = False
    declared: str | None = None


class Shares:
    """Hands out each micro-batch's share ``W_i / W`` of its large batch.

    Where the large batch is a stream, ``W`` is known only at its end. Shares are then relative to the
    first micro-batch, which keeps gradients at their usual magnitude, and :meth:`remaining_scale` is what
    everything must still be multiplied with.
    """

    def __init__(self, contract: LossContract) -> None:
        self._contract = contract
        self._announced: Iterator[Weight] = iter(())
        self._divisor: Weight | None = None
        self._total: Weight = 0.0
        self._is_announced = False
        self.samples = 0

    def announce(self, micro_batches: Sequence[MicroBatch]) -> None:
        """Tells the whole large batch beforehand, so that every share is final when handed out.

        Raises:
            ValueError: the weights add up to nothing.
        """
        weights = [self._weigh(micro_batch) for micro_batch in micro_batches]
        self._announced = iter(weights)
        self._is_announced = True
        self._divisor = self._divide_by(
            sum(weights), sum(micro_batch.samples for micro_batch in micro_batches)
        )

    def take(self, micro_batch: MicroBatch) -> Weight:
        """The share of the next micro-batch, and its entry in the totals."""
        announced = next(self._announced, None)
        weight = self._weigh(micro_batch) if announced is None else announced
        if self._divisor is None:
            # A first piece that weighs nothing (all targets ignored) cannot be the unit.
            if isinstance(weight, Tensor):
                unit: Weight = torch.where(weight > 0, weight, 1.0)
            else:
                unit = weight if weight > 0 else 1.0
            self._divisor = self._divide_by(unit, micro_batch.samples)
        self._total = self._total + weight
        self.samples += micro_batch.samples
        return weight / self._divisor

    def divide(self, share: Weight, pieces: Sequence[MicroBatch]) -> list[Weight]:
        """The shares of all pieces of a micro-batch that had this one."""
        if self._contract.weigh is None:
            return [share] * len(pieces)
        weights = [self._weigh(piece) for piece in pieces]
        total = sum(weights)
        if isinstance(total, Tensor):
            total = torch.where(total > 0, total, 1.0)
        return [share * (weight / total) for weight in weights]

    def start_over(self) -> None:
        """The large batch comes again from its first micro-batch on, split in another way."""
        self._announced = iter(())
        self._total = 0.0
        self.samples = 0
        if not self._is_announced:
            self._divisor = None

    def remaining_scale(self) -> Weight:
        """What the sum of all ``share * loss`` is still to be multiplied with; 1.0 if announced."""
        assert self._divisor is not None
        return self._divisor / self._divide_by(self._total, self.samples)

    def _weigh(self, micro_batch: MicroBatch) -> Weight:
        return 1.0 if self._contract.weigh is None else self._contract.weigh(micro_batch)

    def _divide_by(self, total: Weight, samples: int) -> Weight:
        if self._contract.weigh is None:
            total = 1.0
        if not isinstance(total, Tensor) and not total > 0:
            raise ValueError(
                f"the targets of the large batch weigh {total} in all; at least one must count "
                "(are all of them equal to ignore_index, or is every weight 0?)"
            )
        return total * samples**0.5 if self._contract.inverse_sqrt else total


def read_contract(
    loss_fn: Callable[..., Any] | None,
    normalization: str | Callable[[PyTree], Weight],
) -> LossContract:
    """Reads the contract off a torch loss, or takes the declared one.

    Raises:
        ValueError: an unknown normalization, one that contradicts the loss, or ``"auto"`` with a loss
            that cannot be read.
    """
    if callable(normalization):
        name = getattr(normalization, "__name__", None) or type(normalization).__name__
        return LossContract(
            weigh=functools.partial(_declared_weight, normalization),
            declared=f"normalization={name}",
        )
    if normalization not in NORMALIZATIONS:
        raise ValueError(
            f"normalization is {normalization!r}; it must be one of {', '.join(NORMALIZATIONS)}, or a "
            "callable that takes the targets of a micro-batch and returns its weight"
        )
    known = _read_torch_loss(loss_fn)
    if known is not None:
        return _check_known(known, normalization)
    if normalization == "auto":
        raise ValueError(
            f"normalization='auto' cannot see how {describe_loss(loss_fn)} averages. Declare it: 'mean' "
            "if it averages over samples, 'tokens' if over targets other than -100, 'sum' if it does "
            "not divide, or a callable that returns a micro-batch's denominator"
        )
    inverse_sqrt = normalization == "inverse_sqrt"
    return LossContract(
        weigh=DENOMINATORS["mean" if inverse_sqrt else normalization],
        inverse_sqrt=inverse_sqrt,
        declared=f"normalization={normalization!r}",
    )


@dataclass(frozen=True)
class _Known:
    name: str
    reduction: str
    weigh: Weigh
    elementwise: bool = False


def _check_known(known: _Known, normalization: str) -> LossContract:
    if known.reduction not in ("mean", "batchmean", "sum"):
        raise ValueError(
            f"{known.name} has reduction={known.reduction!r}, so it returns no scalar; "
            "use reduction='mean' or 'sum'"
        )
    sums = known.reduction == "sum"
    if normalization in ("mean", "tokens") and sums:
        raise ValueError(
            f"normalization={normalization!r} says that the loss averages, but {known.name} has "
            "reduction='sum'; use normalization='sum' (or 'auto'), or reduction='mean'"
        )
    if normalization == "sum" and not sums:
        raise ValueError(
            f"normalization='sum' says that the loss does not divide, but {known.name} has "
            f"reduction={known.reduction!r}; use normalization='auto', or reduction='sum'"
        )
    return LossContract(
        weigh=None if sums else known.weigh,
        inverse_sqrt=normalization == "inverse_sqrt",
        elementwise=known.elementwise,
    )


# Losses that average over every element, and losses that average over samples.
_ELEMENT_MODULES = (
    nn.MSELoss,
    nn.L1Loss,
    nn.SmoothL1Loss,
    nn.HuberLoss,
    nn.BCELoss,
    nn.BCEWithLogitsLoss,
    nn.KLDivLoss,
    nn.SoftMarginLoss,
    nn.HingeEmbeddingLoss,
    nn.PoissonNLLLoss,
)
_SAMPLE_MODULES = (nn.MultiMarginLoss, nn.MultiLabelMarginLoss, nn.MultiLabelSoftMarginLoss)
_CLASS_MODULES = (nn.CrossEntropyLoss, nn.NLLLoss)

_ELEMENT_FUNCTIONS = (
    functional.mse_loss,
    functional.l1_loss,
    functional.smooth_l1_loss,
    functional.huber_loss,
    functional.binary_cross_entropy,
    functional.binary_cross_entropy_with_logits,
    functional.kl_div,
)
_CLASS_FUNCTIONS = (functional.cross_entropy, functional.nll_loss)


def _read_torch_loss(loss_fn: Callable[..., Any] | None) -> _Known | None:
    # The exact type: a subclass may compute anything.
    kind = type(loss_fn)
    if isinstance(loss_fn, nn.Module):
        weigh: Weigh
        if kind in _CLASS_MODULES:
            assert isinstance(loss_fn, _CLASS_MODULES)
            # Read each time: the weights may be replaced or moved after today.
            weigh = _ClassWeight(
                functools.partial(getattr, loss_fn, "weight"), loss_fn.ignore_index
            )
        elif kind in _ELEMENT_MODULES:
            return _elementwise(f"{kind.__name__}()", str(loss_fn.reduction))
        elif kind in _SAMPLE_MODULES:
            weigh = _count_samples
        else:
            return None
        return _Known(f"{kind.__name__}()", str(loss_fn.reduction), weigh)
    keywords: Mapping[str, Any] = {}
    function = loss_fn
    if isinstance(loss_fn, functools.partial) and not loss_fn.args:
        function, keywords = loss_fn.func, loss_fn.keywords
    if "size_average" in keywords or "reduce" in keywords:
        # The deprecated pair overrules reduction in ways of its own: to be declared.
        return None
    reduction = str(keywords.get("reduction", "mean"))
    name = getattr(function, "__name__", "")
    if function in _CLASS_FUNCTIONS:
        weigh = _ClassWeight(
            functools.partial(keywords.get, "weight"),
            int(keywords.get("ignore_index", IGNORE_INDEX)),
        )
        return _Known(name, reduction, weigh)
    if function in _ELEMENT_FUNCTIONS:
        return _elementwise(name, reduction)
    return None


def _elementwise(name: str, reduction: str) -> _Known:
    weigh = _count_samples if reduction == "batchmean" else _count_elements
    return _Known(name, reduction, weigh, elementwise=True)


def _count_samples(micro_batch: MicroBatch) -> Weight:
    return float(micro_batch.samples)


def _count_elements(micro_batch: MicroBatch) -> Weight:
    return float(_target_tensor(micro_batch).numel())


def _count_tokens(micro_batch: MicroBatch) -> Weight:
    tree = micro_batch.targets if micro_batch.targets is not None else micro_batch.inputs
    if isinstance(tree, Mapping) and "labels" in tree:
        tree = tree["labels"]
    return _total((_signed(_as_tensor(tree, "normalization='tokens'")) != IGNORE_INDEX).sum())


class _ClassWeight:
    """The denominator of cross entropy: the class weights of all targets that are not ignored."""

    def __init__(self, class_weights: Callable[[], Tensor | None], ignore_index: int) -> None:
        self._class_weights = class_weights
        self._ignore_index = ignore_index
        self._copies: dict[torch.device, tuple[Tensor, int, Tensor]] = {}

    def __call__(self, micro_batch: MicroBatch) -> Weight:
        targets = _target_tensor(micro_batch)
        if targets.is_floating_point():
            # Class probabilities, (samples, classes, ...): torch divides by the number of positions.
            # Without classes it refuses them itself.
            return float(targets.numel() // targets.shape[1] if targets.ndim > 1 else 1)
        targets = _signed(targets)
        counted = targets != self._ignore_index
        class_weights = self._class_weights()
        if class_weights is None:
            return _total(counted.sum())
        weights = self._weights_on(class_weights, targets.device)
        # ignore_index may lie outside the classes.
        return _total((weights[torch.where(counted, targets, 0)] * counted).sum())

    def _weights_on(self, class_weights: Tensor, device: torch.device) -> Tensor:
        # Kept, because weights on a device and targets on the host would mean a wait each time.
        source, version, copy = self._copies.get(device, (None, -1, class_weights))
        if source is not class_weights or version != class_weights._version:
            copy = class_weights.detach().to(device=device, dtype=torch.float64)
            self._copies[device] = (class_weights, class_weights._version, copy)
        return copy


def _declared_weight(normalization: Callable[[PyTree], Weight], micro_batch: MicroBatch) -> Weight:
    tree = micro_batch.targets if micro_batch.targets is not None else micro_batch.inputs
    weight = normalization(gathered(tree))
    if isinstance(weight, Tensor):
        if weight.numel() != 1:
            raise ValueError(
                f"normalization returned a tensor of shape {tuple(weight.shape)}; "
                "it must return one number, the weight of the micro-batch"
            )
        weight = _total(weight.detach().reshape(()))
    else:
        weight = float(weight)
    if isinstance(weight, float) and not weight >= 0:
        raise ValueError(
            f"normalization returned {weight} for a micro-batch of {micro_batch.samples} samples; a "
            "weight must be a number of at least 0"
        )
    return weight


def _signed(targets: Tensor) -> Tensor:
    """Bytes are classes, too, but no byte is -100: compared as a byte, that would be class 156."""
    return targets.long() if targets.dtype == torch.uint8 else targets


def _total(value: Tensor) -> Weight:
    # On the host a number costs nothing; on a CUDA device, reading it would wait for the device.
    return value.double() if value.is_cuda else float(value)


def _target_tensor(micro_batch: MicroBatch) -> Tensor:
    return _as_tensor(micro_batch.targets, "normalization='auto'")


def _as_tensor(tree: PyTree, needed_by: str) -> Tensor:
    if isinstance(tree, (np.ndarray, Rows)):
        return as_tensor(tree)
    if not isinstance(tree, Tensor):
        raise ValueError(
            f"{needed_by} counts in one tensor of targets, but they are a {type(tree).__name__}; "
            "pass normalization=a callable that returns the weight of a micro-batch's targets"
        )
    return tree


# What a loss can be declared to divide by, by name.
DENOMINATORS: dict[str, Weigh | None] = {
    "mean": _count_samples,
    "tokens": _count_tokens,
    "sum": None,
}


def describe_loss(loss_fn: Callable[..., Any] | None) -> str:
    """What errors call it."""
    if loss_fn is None:
        return "a model that returns its own loss"
    return f"loss_fn={getattr(loss_fn, '__name__', None) or type(loss_fn).__name__}"
