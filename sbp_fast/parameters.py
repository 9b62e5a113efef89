"""Which parameters a step concerns: the model's, its loss's, and what else the optimizer updates."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Parameters:
    """The parameters of a step, each once however often it is shared.

    Attributes:
        all: every one of them, frozen ones included: an optimizer updates those too, if they have a
            gradient left from earlier.
        trainable: those that require a gradient.
        state: what a step relies on; while it is equal, nothing has been added, frozen, moved or cast.
    """

    all: tuple[Tensor, ...]
    trainable: tuple[Tensor, ...]
    state: tuple[tuple[int, bool, torch.device, torch.dtype], ...]

    @property
    def device(self) -> torch.device:
        return self.trainable[0].device


def find_parameters(modules: tuple[nn.Module, ...], optimizer: torch.optim.Optimizer) -> Parameters:
    """Looks for them anew: layers may come, go, be frozen, moved or cast between steps."""
    found: dict[int, Tensor] = {}
    for module in modules:
        found.update((id(parameter), parameter) for parameter in module.parameters())
    for group in optimizer.param_groups:
        found.update((id(parameter), parameter) for parameter in group["params"])
    return Parameters(
        all=tuple(found.values()),
        trainable=tuple(p for p in found.values() if p.requires_grad),
        state=tuple((id(p), p.requires_grad, p.device, p.dtype) for p in found.values()),
    )


def names_of(parameters: tuple[Tensor, ...], modules: tuple[nn.Module, ...]) -> list[str]:
    """What errors call each parameter."""
    names: dict[int, str] = {}
    for module in modules:
        for name, parameter in module.named_parameters():
            names.setdefault(id(parameter), f"parameter {name!r}")
    return [
        names.get(id(parameter), f"parameter {position} (the optimizer's alone)")
        for position, parameter in enumerate(parameters)
    ]


def modules_of(model: nn.Module, loss_fn: Callable[..., Any] | None) -> tuple[nn.Module, ...]:
    """What holds parameters and buffers: the model, and the loss where it is a module."""
    return (model, loss_fn) if isinstance(loss_fn, nn.Module) else (model,)


def modules_below(roots: Iterable[nn.Module]) -> list[nn.Module]:
    """These and all modules below, each once; ``nn.Module.modules`` takes three times as long."""
    found = dict.fromkeys(roots)
    waiting = list(found)
    for module in waiting:
        for child in module._modules.values():
            if child is not None and child not in found:
                found[child] = None
                waiting.append(child)
    return waiting


def _same_buffers(left: dict[str, Tensor | None], right: dict[str, Tensor | None]) -> bool:
    """The same tensors by the same names in the same order."""
    return list(left) == list(right) and all(left[name] is right[name] for name in right)
