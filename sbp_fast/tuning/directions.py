"""Which way an optimizer's update went, per unit of its learning rate: ``-(d update / d lr)``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Group = Mapping[str, Any]
State = Mapping[str, Any]

_KNOWN = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)


def check_optimizer(optimizer: Any) -> None:
    """Raises TypeError or ValueError for one whose directions are not known here."""
    # The exact type: a subclass may update in any way.
    if type(optimizer) not in _KNOWN:
        raise TypeError(
            f"optimizer is a {type(optimizer).__name__}; hypergradients are known for torch.optim.SGD, "
            "Adam and AdamW: use one of these, or a schedule from torch.optim.lr_scheduler"
        )
    if any(group["maximize"] for group in optimizer.param_groups):
        raise ValueError(
            "the optimizer has maximize=True; hypergradients are for a loss that is minimised: negate it"
        )


def is_in_state(group: Group) -> bool:
    """Whether the optimizer's state determines the last direction."""
    return "momentum" not in group or (group["momentum"] != 0 and not group["nesterov"])


def direction_from_state(parameter: Tensor, group: Group, state: State) -> Tensor | None:
    """Of the last update of ``parameter``; None where there was none."""
    if "momentum" in group:
        buffer: Tensor | None = state.get("momentum_buffer")
        return buffer
    if not state:
        return None
    # Adam (Kingma and Ba 2015, algorithm 1), and AMSGrad.
    beta1, beta2 = group["betas"]
    squares = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]
    root = (squares / (1 - beta2 ** state["step"])).sqrt_()
    direction: Tensor = state["exp_avg"] / root.add_(group["eps"]).mul_(1 - beta1 ** state["step"])
    if group["decoupled_weight_decay"] and group["weight_decay"] != 0:
        # AdamW decays what the parameter was before: x' = x - lr (d + decay x), and x' is known.
        decay = group["weight_decay"]
        direction.add_(parameter, alpha=decay).div_(1 - group["lr"] * decay)
    return direction


def direction_to_come(parameter: Tensor, gradient: Tensor, group: Group, state: State) -> Tensor:
    """Of SGD's next update, without momentum or with Nesterov's; ``gradient`` itself where it is that."""
    decay, momentum = group["weight_decay"], group["momentum"]
    direction: Tensor = gradient if decay == 0 else gradient.add(parameter, alpha=decay)
    if momentum == 0:
        return direction
    # The buffer will be b' = momentum b + g (of the first step: g), the direction g + momentum b'.
    before = state.get("momentum_buffer")
    direction = direction * (1 + momentum)
    if before is not None:
        direction.add_(before, alpha=momentum**2)
    return direction


def slope(parameter: Tensor, gradient: Tensor, direction: Tensor, group: Group) -> Tensor:
    """Of the loss against a direction; float64, no dimensions. Weight decay that goes into the gradient
    is a part of the loss."""
    along = _dot(gradient, direction)
    decay = group["weight_decay"]
    if decay != 0 and not group.get("decoupled_weight_decay", False):
        along = along + decay * _dot(parameter, direction)
    return along


def _dot(left: Tensor, right: Tensor) -> Tensor:
    dtype = torch.promote_types(left.dtype, torch.float32)
    return torch.dot(left.reshape(-1).to(dtype), right.reshape(-1).to(dtype)).double()
