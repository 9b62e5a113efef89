"""Runs the user's model and loss on one micro-batch: how they are called, and what must come back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .batches import PyTree

Roots = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Forward:
    """The model, its loss, and the autocast context in which both run.

    ``elementwise``: the loss pairs outputs and targets element by element.
    """

    model: nn.Module
    loss_fn: Callable[..., Any] | None
    autocast: Callable[[], AbstractContextManager[Any]]
    elementwise: bool

    def outputs(self, inputs: PyTree) -> Any:
        """What the model returns for one micro-batch."""
        with self.autocast():
            return self.call_model(inputs)

    def loss(self, outputs: Any, targets: PyTree) -> Tensor:
        """The loss of :meth:`outputs`, with its graph; no dimensions.

        Raises:
            ValueError: the loss is no scalar, or does not depend on a trainable parameter; outputs and
                targets have not the same number of dimensions, where they are compared by element.
            TypeError: the loss is no tensor.
        """
        with self.autocast():
            loss = self.call_loss(outputs, targets)
        return _check_loss(loss)

    def call_model(self, inputs: PyTree) -> Any:
        """What the model returns, in the autocast context of the caller."""
        return _call(self.model, inputs)

    def call_loss(self, outputs: Any, targets: PyTree) -> Any:
        """The loss of such outputs, whatever it is, in the autocast context of the caller."""
        if self.loss_fn is None:
            return _own_loss(outputs)
        if self.elementwise:
            _check_no_broadcast(outputs, targets)
        return self.loss_fn(outputs, targets)


def backward_context(device_type: str) -> AbstractContextManager[Any]:
    """Backward runs in the types that forward chose: an autocast context of the caller's is suspended."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def _call(model: nn.Module, inputs: PyTree) -> Any:
    if isinstance(inputs, Mapping):
        return model(**inputs)
    # A named tuple is one argument; a plain tuple is the arguments.
    if type(inputs) is tuple:
        return model(*inputs)
    return model(inputs)


def _own_loss(outputs: Any) -> Any:
    if isinstance(outputs, Tensor):
        return outputs
    if getattr(outputs, "loss", None) is not None:
        return outputs.loss
    if isinstance(outputs, Mapping) and "loss" in outputs:
        return outputs["loss"]
    raise TypeError(
        f"loss_fn is None, but the model returned a {type(outputs).__name__} that is no loss and has "
        "neither .loss nor ['loss']; pass a loss_fn, or give the model what it needs to compute its loss "
        "(labels, for instance)"
    )


def _check_no_broadcast(outputs: Any, targets: Any) -> None:
    # Shapes (N, 1) and (N,) would meet as (N, N): every sample with every other, of its micro-batch only.
    are_tensors = isinstance(outputs, Tensor) and isinstance(targets, Tensor)
    if are_tensors and outputs.ndim != targets.ndim:
        raise ValueError(
            f"outputs of shape {tuple(outputs.shape)} and targets of shape {tuple(targets.shape)} would "
            "be broadcast against each other, which mixes the samples of a micro-batch; give them the "
            "same number of dimensions (.squeeze(1) or .unsqueeze(1))"
        )


def _check_loss(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"the loss is a {type(loss).__name__}; it must be a tensor with one element, computed from "
            "the model's outputs"
        )
    if loss.numel() != 1:
        raise ValueError(
            f"the loss has shape {tuple(loss.shape)}; it must be a scalar: use reduction='mean' or "
            "'sum', or reduce it in loss_fn"
        )
    if not loss.requires_grad:
        raise ValueError(
            "the loss does not depend on any trainable parameter; check for .detach(), .item() or "
            "torch.no_grad() in the model or in loss_fn"
        )
    return loss.reshape(())
