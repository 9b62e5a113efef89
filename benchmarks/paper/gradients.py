"""How far the first step's gradient is from the full batch's."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor, nn

from .ways import PLAIN, SBP, Setting, accumulate, accumulator_of


def gradient_difference(way: str, setting: Setting, images: Tensor, targets: Tensor) -> float:
    """``|g - g_full| / |g_full|``, 2-norms over all parameters, of one large batch on the host.

    On copies in float64, where rounding errors do not hide what a way computes; without a budget.

    Args:
        way: :data:`benchmarks.paper.ways.SBP` or :data:`benchmarks.paper.ways.PLAIN`.

    Raises:
        torch.OutOfMemoryError: the device has no memory for the full batch.
    """
    full, parts = (_in_float64(setting) for _ in range(2))
    accumulate(full, images, targets, len(images))
    if way == SBP:
        accumulator_of(parts).backward(images, targets)
    elif way == PLAIN:
        accumulate(parts, images, targets, setting.micro_batch)
    else:
        raise ValueError(f"no gradient of {way!r} is compared; expected {SBP!r} or {PLAIN!r}")
    expected = _gradient(full.model)
    return float((_gradient(parts.model) - expected).norm() / expected.norm())


def _in_float64(setting: Setting) -> Setting:
    model = copy.deepcopy(setting.model).double()
    # SBP wants an optimizer, which makes no step here.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    return replace(setting, model=model, optimizer=optimizer, budget=None)


def _gradient(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
