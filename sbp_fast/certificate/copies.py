"""Copies of a model, its loss and its batch: as they are, or in float64."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..batches import PyTree, as_tensor
from ..data.rows import Rows
from ..parameters import modules_of

LossFunction = Callable[..., Any] | None


class Copies(NamedTuple):
    """A model and its loss. Where the loss holds the model, it holds this one."""

    model: nn.Module
    loss_fn: LossFunction

    @property
    def parameters(self) -> list[Tensor]:
        """All of them, frozen ones included."""
        modules = modules_of(self.model, self.loss_fn)
        return [parameter for module in modules for parameter in module.parameters()]

    @property
    def trainable(self) -> dict[str, Tensor]:
        """Parameters by name: the model's in its order, then the loss's, each once."""
        named = dict(self.model.named_parameters())
        if isinstance(self.loss_fn, nn.Module):
            own = {id(parameter) for parameter in named.values()}
            for name, parameter in self.loss_fn.named_parameters(prefix="loss_fn"):
                if id(parameter) not in own:
                    named[name] = parameter
        return {name: parameter for name, parameter in named.items() if parameter.requires_grad}


def copied(originals: Copies) -> Copies:
    """Copies without gradients.

    Raises:
        ValueError: something in them refuses to be copied.
    """
    try:
        copies = copy.deepcopy(originals)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise ValueError(
            f"the model or its loss cannot be copied ({type(error).__name__}: {error}), and verify works "
            "on copies; build them anew and verify them before they are used, or detach the tensors "
            "that they keep"
        ) from error
    for parameter in copies.parameters:
        parameter.grad = None
    return copies


def in_double(copies: Copies, device: torch.device) -> Copies:
    """The same copies, cast to float64 and moved to ``device``."""
    copies.model.to(device).double()
    return Copies(copies.model, _loss_in_double(copies.loss_fn, device))


def _loss_in_double(loss_fn: LossFunction, device: torch.device) -> LossFunction:
    # Of a method: of another module than the model, or of the model, which has been moved already.
    owner = getattr(loss_fn, "__self__", loss_fn)
    if isinstance(owner, nn.Module):
        owner.to(device).double()
    if isinstance(loss_fn, functools.partial):
        return functools.partial(
            _loss_in_double(loss_fn.func, device) or loss_fn.func,
            *placed(loss_fn.args, device, double=True),
            **placed(loss_fn.keywords, device, double=True),
        )
    return loss_fn


def placed(tree: PyTree, device: torch.device | None, *, double: bool) -> PyTree:
    """The same pytree as tensors, apart from the caller's: in float64, if asked for.

    Args:
        device: where they are to be; None: where they are.
    """

    def place(leaf: Any) -> Any:
        if isinstance(leaf, (np.ndarray, Rows)):
            leaf = as_tensor(leaf)
        if not isinstance(leaf, Tensor):
            return leaf
        # A model may differentiate by its inputs; what it finds must not reach the caller's.
        wanted, leaf = leaf.requires_grad, leaf.detach().to(device)
        if double and leaf.is_floating_point():
            leaf = leaf.double()
        elif double and leaf.is_complex():
            leaf = leaf.to(torch.complex128)
        return leaf.requires_grad_(wanted)

    return pytree.tree_map(place, tree)


@contextmanager
def computing_in_double(device: torch.device) -> Iterator[None]:
    """What a model makes by itself is in float64 too, and no context of the caller's narrows it."""
    before = torch.get_default_dtype()
    with ExitStack() as stack:
        for kind in {device.type, "cpu"}:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


@contextmanager
def left_alone(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Keeps ``p.grad`` as it is, and sees to it that no gradient comes there.

    Raises:
        ValueError: one came: what was computed was not of the copies.
    """
    before = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    try:
        yield
        reached = any(parameter.grad is not None for parameter in parameters)
    finally:
        for parameter, gradient in zip(parameters, before, strict=True):
            parameter.grad = gradient
    if reached:
        raise ValueError(
            "gradients reached the model itself and not its copy, so there is something (a loss_fn that "
            "is a closure, say) that holds the model without being copied with it; make it a torch.nn."
            "Module, or a method of one, that holds the model"
        )
