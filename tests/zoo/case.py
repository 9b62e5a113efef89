"""What every builder of the zoo returns: a model with its loss and one large batch."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree

SAMPLES = 12
CLASSES = 5


@dataclass(frozen=True)
class Case:
    """A model and one large batch of :data:`SAMPLES` samples, in float32 as built.

    Attributes:
        normalization: as in :class:`sbp_fast.StreamedAccumulator`.
        oracle: what the oracle computes on, where that is not the model itself; parameters and buffers
            have the same names and values.
    """

    model: nn.Module
    loss_fn: Callable[..., Any] | None
    inputs: Any
    targets: Any
    normalization: Any = "auto"
    oracle: nn.Module | None = None

    def to(self, dtype: torch.dtype) -> Case:
        """A copy of everything, with parameters, buffers and floating-point data in ``dtype``."""
        loss_fn = copy.deepcopy(self.loss_fn)
        return Case(
            copy.deepcopy(self.model).to(dtype),
            loss_fn.to(dtype) if isinstance(loss_fn, nn.Module) else loss_fn,
            _cast(self.inputs, dtype),
            _cast(self.targets, dtype),
            self.normalization,
            None if self.oracle is None else copy.deepcopy(self.oracle).to(dtype),
        )


Builder = Callable[[], Case]
_BUILDERS: list[Builder] = []


def seeded(build: Builder) -> Builder:
    """Every call builds the same model and batch, whoever draws random numbers besides."""

    @functools.wraps(build)
    def builder() -> Case:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            case = build()
            unsettle_batch_norm(case.model)
        if case.oracle is not None:
            case.oracle.load_state_dict(case.model.state_dict())
        return case

    _BUILDERS.append(builder)
    return builder


def builders_in(module: ModuleType) -> list[Builder]:
    """All builders that a module of the zoo defines."""
    return [builder for builder in _BUILDERS if builder.__module__ == module.__name__]


def unsettle_batch_norm(model: nn.Module) -> None:
    """Gives batch norms the affine weights and running statistics of a model in mid-training: zeros and
    ones would hide a weight that is forgotten, or a momentum on the wrong side."""
    with torch.no_grad():
        for module in model.modules():
            if not isinstance(module, _BatchNorm):
                continue
            if module.affine and not parametrize.is_parametrized(module):
                module.weight.mul_(torch.rand_like(module.weight) / 2 + 0.75)
                module.bias.add_(torch.randn_like(module.bias), alpha=0.1)
            if module.track_running_stats:
                module.running_mean.normal_(std=0.2)
                module.running_var.uniform_(0.5, 1.5)
                module.num_batches_tracked.fill_(3)


def images(size: int, channels: int = 3) -> Tensor:
    """``(SAMPLES, channels, size, size)``; samples differ in brightness and contrast, so that statistics
    of a few of them are not those of all."""
    contrast = torch.rand(SAMPLES, 1, 1, 1) + 0.5
    brightness = torch.randn(SAMPLES, 1, 1, 1) / 2
    return torch.randn(SAMPLES, channels, size, size) * contrast + brightness


def labels(classes: int = CLASSES) -> Tensor:
    return torch.randint(classes, (SAMPLES,))


def _cast(tree: Any, dtype: torch.dtype) -> Any:
    def cast(leaf: Any) -> Any:
        floating = isinstance(leaf, Tensor) and leaf.is_floating_point()
        return leaf.to(dtype) if floating else leaf

    return pytree.tree_map(cast, tree)
