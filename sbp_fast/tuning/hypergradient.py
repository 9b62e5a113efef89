"""The learning rate, by gradient descent on it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .directions import (
    check_optimizer,
    direction_from_state,
    direction_to_come,
    is_in_state,
    slope,
)


class _Kept(NamedTuple):
    direction: Tensor
    version: int


class HypergradientLR:
    """Adapts an optimizer's learning rates to how far the last update's direction still leads down.

    Gradient descent on the learning rate, which is how the paper would have ``mu`` found (Ravi Kumar and
    Sivakumar 2025, eq. 4), in the form of Baydin et al. 2018, arXiv 1703.04782, algorithms 4 to
    6 (SGD-HD, SGDN-HD, Adam-HD): the loss after an update depends on the rate that was used, and its
    derivative is known as soon as the next gradient is. Of each parameter group, before each update::

        lr = max(0, lr + hyper_lr * (gradient . direction of the last update, per unit of lr))

    There is nothing to call: ``optimizer.step`` does it, and so does
    :meth:`sbp_fast.StreamedAccumulator.step`, with the gradient of the large batch as the optimizer gets
    it (clipped, where it is clipped). A step that is skipped is none. Baydin et al. have one rate for all
    parameters and no bound at 0.

    Memory: SGD with momentum, Adam and AdamW tell the direction by their state, and nothing is kept. For
    SGD without momentum, or with Nesterov's, one tensor for each parameter is: the gradient itself where
    that is the direction and nobody writes to it after the step, else one of its size.

    Time: gradients and directions are read once, and the device is waited for, as learning rates lie on
    the host; one that is a tensor changes without.

    Args:
        optimizer: ``torch.optim.SGD``, ``Adam`` or ``AdamW``. It keeps this object.
        hyper_lr: the learning rate of the learning rate, at least 0. What suits goes with
            the size of the gradients, and differs by orders of magnitude between SGD and Adam.

    Raises:
        TypeError, ValueError: another optimizer, ``maximize=True``, or no such ``hyper_lr``.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, hyper_lr: float) -> None:
        check_optimizer(optimizer)
        self._optimizer = optimizer
        self._hyper_lr = _checked(hyper_lr)
        self._kept: dict[Tensor, _Kept] = {}
        self._copies = False
        self._handle = optimizer.register_step_pre_hook(self._before_update)

    def get_last_lr(self) -> list[float]:
        """Of each parameter group, as the last update used it."""
        return [float(group["lr"]) for group in self._optimizer.param_groups]

    def remove(self) -> None:
        """Learning rates stay as they are from now on."""
        self._handle.remove()
        self._kept.clear()

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` takes. Learning rates are in the optimizer's own."""
        return {
            "hyper_lr": self._hyper_lr,
            "directions": [
                self._kept[parameter].direction if parameter in self._kept else None
                for parameter in self._parameters()
            ],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a saved state, of an optimizer with the same parameters in the same order.

        Raises:
            ValueError: it is of another number of parameters.
        """
        parameters, directions = self._parameters(), state["directions"]
        if len(parameters) != len(directions):
            raise ValueError(
                f"the state is of {len(directions)} parameters, and the optimizer has "
                f"{len(parameters)}; load it where the optimizer's own state_dict fits"
            )
        self._hyper_lr = float(state["hyper_lr"])
        self._kept = {
            parameter: _Kept(moved, moved._version)
            for parameter, direction in zip(parameters, directions, strict=True)
            if direction is not None
            for moved in (direction.to(parameter.device),)
        }

    def _parameters(self) -> list[Tensor]:
        return [p for group in self._optimizer.param_groups for p in group["params"]]

    @torch.no_grad()
    def _before_update(self, _: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        self._check_gradients_are_final((*arguments[1:], *keywords.values()))
        # 1. How the loss changes along the last update, for all groups before the first is waited for.
        groups = self._optimizer.param_groups
        slopes = [self._slope(group) for group in groups]
        # 2. The learning rates of this update.
        for group, along in zip(groups, slopes, strict=True):
            if along is not None:
                self._change(group, along)
        # 3. Its direction, where the optimizer will not remember it.
        for group in groups:
            if not is_in_state(group):
                self._keep(group)

    def _check_gradients_are_final(self, arguments: tuple[Any, ...]) -> None:
        if any(argument is not None for argument in arguments):
            raise TypeError(
                "optimizer.step() was given a closure, which computes the gradient after HypergradientLR "
                "has looked at it; compute it first, and call step() without"
            )
        if getattr(self._optimizer, "grad_scale", None) is not None:
            raise ValueError(
                "a fused optimizer unscales gradients itself, after HypergradientLR has looked at them; "
                "make it with fused=False, or call grad_scaler.unscale_(optimizer) before"
            )

    def _slope(self, group: dict[str, Any]) -> Tensor | None:
        slopes = []
        for parameter in group["params"]:
            direction = self._last_direction(parameter, group)
            if direction is not None and parameter.grad is not None:
                slopes.append(slope(parameter, parameter.grad, direction, group))
        return torch.stack(slopes).sum() if slopes else None

    def _last_direction(self, parameter: Tensor, group: dict[str, Any]) -> Tensor | None:
        if is_in_state(group):
            state = self._optimizer.state.get(parameter, {})
            return direction_from_state(parameter, group, state)
        kept = self._kept.pop(parameter, None)
        if kept is not None and kept.direction._version != kept.version:
            # Somebody fills gradients with zeros, or adds to them: this one is lost, later ones are not.
            self._copies = True
            return None
        return None if kept is None else kept.direction

    def _change(self, group: dict[str, Any], along: Tensor) -> None:
        lr = group["lr"]
        if isinstance(lr, Tensor):
            change = torch.nan_to_num(self._hyper_lr * along, nan=0.0, posinf=0.0, neginf=0.0)
            lr.add_(change.to(lr)).clamp_(min=0.0)
        elif math.isfinite(read := self._hyper_lr * float(along)):
            group["lr"] = max(0.0, lr + read)

    def _keep(self, group: dict[str, Any]) -> None:
        for parameter in group["params"]:
            gradient = parameter.grad
            if gradient is not None:
                state = self._optimizer.state.get(parameter, {})
                direction = direction_to_come(parameter, gradient, group, state)
                if self._copies and direction is gradient:
                    direction = gradient.clone()
                self._kept[parameter] = _Kept(direction, direction._version)


def _checked(hyper_lr: Any) -> float:
    if isinstance(hyper_lr, bool) or not isinstance(hyper_lr, Real) or not float(hyper_lr) >= 0:
        raise ValueError(
            f"hyper_lr is {hyper_lr!r}; it must be a number of at least 0, 1e-4 say: the learning "
            "rate of the learning rate"
        )
    return float(hyper_lr)
