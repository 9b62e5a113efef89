"""The oracle: the whole large batch at once, in float64, in plain PyTorch.

It shares no code with the library. Whatever is tested must come close to this.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import tolerances
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

Gradients = dict[str, Tensor | None]
LossFunction = Callable[..., Any] | None


@dataclass(frozen=True)
class FullBatch:
    """The loss of a large batch and the gradient of every parameter, in float64.

    ``loss_gradients`` are those of a loss that is a module. ``buffers``: the model's, after this one
    forward and backward.
    """

    loss: Tensor
    gradients: Gradients
    loss_gradients: Gradients
    buffers: dict[str, Tensor]

    @property
    def norm(self) -> float:
        return total_norm(self.gradients)


def full_batch(
    model: nn.Module, loss_fn: LossFunction, inputs: Any, targets: Any = None, factor: float = 1.0
) -> FullBatch:
    """Computes on a float64 copy of the model, which stays as it is.

    Args:
        factor: multiplies the loss (the paper's ``1 / sqrt(B)``, say).
    """
    model, loss_fn = _double_model(model), _double_loss(loss_fn)
    with torch.enable_grad(), torch.autocast("cpu", enabled=False):
        loss = _loss(model, loss_fn, in_double(inputs), in_double(targets)) * factor
        loss.backward()
    return FullBatch(
        loss.detach(),
        gradients_of(model),
        gradients_of(loss_fn) if isinstance(loss_fn, nn.Module) else {},
        buffers_of(model),
    )


@dataclass(frozen=True)
class Trajectory:
    """What plain training on whole batches went through."""

    losses: list[float]
    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]


def full_batch_trajectory(
    model: nn.Module,
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    loss_fn: LossFunction,
    batches: Iterable[tuple[Any, Any]],
    max_grad_norm: float | None = None,
) -> Trajectory:
    """One optimizer step for every ``(inputs, targets)``, on a float64 copy of the model."""
    model, loss_fn = _double_model(model), _double_loss(loss_fn)
    optimizer = make_optimizer(model)
    losses = []
    for inputs, targets in batches:
        optimizer.zero_grad()
        loss = _loss(model, loss_fn, in_double(inputs), in_double(targets))
        loss.backward()
        if max_grad_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        optimizer.step()
        losses.append(float(loss.detach()))
    return Trajectory(losses, parameters_of(model), buffers_of(model))


def gradients_of(model: nn.Module) -> Gradients:
    """Copies of all ``p.grad`` by name."""
    return {
        name: None if parameter.grad is None else parameter.grad.detach().clone()
        for name, parameter in model.named_parameters()
    }


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def buffers_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_buffers()}


def in_double(tree: Any) -> Any:
    """The same pytree with floating-point leaves in float64; NumPy arrays become tensors."""

    def convert(leaf: Any) -> Any:
        if isinstance(leaf, np.ndarray):
            leaf = torch.from_numpy(np.array(leaf))
        if isinstance(leaf, Tensor):
            leaf = leaf.detach().cpu()
            return leaf.double() if leaf.is_floating_point() else leaf
        return leaf

    return pytree.tree_map(convert, tree)


def total_norm(gradients: Mapping[str, Tensor | None]) -> float:
    squares = [float(g.double().square().sum()) for g in gradients.values() if g is not None]
    return float(np.sqrt(sum(squares)))


def total_relative_error(
    actual: Mapping[str, Tensor | None], oracle: Mapping[str, Tensor | None]
) -> float:
    """The norm of the difference of all gradients over the norm of all; every name must agree."""
    assert actual.keys() == oracle.keys()
    distance = {
        name: _zeros_if_none(actual[name], oracle[name])
        - _zeros_if_none(oracle[name], actual[name])
        for name in oracle
        if actual[name] is not None or oracle[name] is not None
    }
    norm = total_norm(oracle)
    return total_norm(distance) / norm if norm else total_norm(distance)


def relative_errors(
    actual: Mapping[str, Tensor | None], oracle: Mapping[str, Tensor | None]
) -> dict[str, float]:
    """The error of every parameter that has a gradient; both must have the same ones.

    A parameter is measured against its own norm; one whose gradient nearly vanishes (the sum of large
    terms that cancel) against a fraction of the norm of all, since its rounding errors are those of
    the terms.
    """
    assert actual.keys() == oracle.keys()
    floor = tolerances.VANISHING * total_norm(oracle)
    errors = {}
    for name, expected in oracle.items():
        gradient = actual[name]
        if expected is None:
            assert gradient is None, f"{name} has a gradient, the oracle has none"
            continue
        assert gradient is not None, f"{name} has no gradient"
        assert gradient.shape == expected.shape, name
        distance = float((gradient.detach().double().cpu() - expected).norm())
        scale = max(float(expected.norm()), floor)
        errors[name] = distance / scale if scale else (math.inf if distance else 0.0)
    return errors


def assert_gradients_match(
    actual: Mapping[str, Tensor | None], oracle: Mapping[str, Tensor | None], tolerance: float
) -> None:
    """Compares every parameter by itself, as :func:`relative_errors` does, then all together."""
    for name, error in relative_errors(actual, oracle).items():
        assert error <= tolerance, f"{name}: relative error {error:.3e}, tolerance {tolerance:.1e}"
    error = total_relative_error(actual, oracle)
    assert error <= tolerance, f"total relative error {error:.3e}, tolerance {tolerance:.1e}"


def assert_close(actual: Tensor | float, expected: Tensor | float, tolerance: float) -> None:
    """Two numbers, relative to the second."""
    actual, expected = float(actual), float(expected)
    assert abs(actual - expected) <= tolerance * abs(expected), (actual, expected)


def _double_model(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model).cpu().double()
    model.zero_grad(set_to_none=True)
    return model


def _double_loss(loss_fn: LossFunction) -> LossFunction:
    if isinstance(loss_fn, nn.Module):
        return copy.deepcopy(loss_fn).cpu().double()
    if isinstance(loss_fn, functools.partial):
        return functools.partial(
            loss_fn.func, *in_double(loss_fn.args), **in_double(loss_fn.keywords)
        )
    return loss_fn


def _loss(model: nn.Module, loss_fn: LossFunction, inputs: Any, targets: Any) -> Tensor:
    if isinstance(inputs, dict):
        outputs = model(**inputs)
    elif type(inputs) is tuple:
        outputs = model(*inputs)
    else:
        outputs = model(inputs)
    if loss_fn is not None:
        loss = loss_fn(outputs, targets)
    elif isinstance(outputs, Tensor):
        loss = outputs
    else:
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs.loss
    assert isinstance(loss, Tensor)
    return loss


def _zeros_if_none(gradient: Tensor | None, other: Tensor | None) -> Tensor:
    if gradient is None:
        assert other is not None
        return torch.zeros(other.shape, dtype=torch.float64)
    return gradient.detach().double().cpu()
