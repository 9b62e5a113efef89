"""Dropout in every form a layer can have.

Every net drops at two places or more: with one alone, the generator would hand each sample its own
numbers whatever the split.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from .case import CLASSES, SAMPLES, Case, images, labels, seeded

WIDTH = 8


def _conv_net(first: nn.Module, second: nn.Module) -> Case:
    model = nn.Sequential(
        nn.Conv2d(3, WIDTH, 3),
        nn.SiLU(),
        first,
        nn.Conv2d(WIDTH, WIDTH, 3),
        nn.SiLU(),
        second,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(WIDTH, CLASSES),
    )
    return Case(model, nn.CrossEntropyLoss(), images(7), labels())


@seeded
def elements() -> Case:
    return _conv_net(nn.Dropout(0.3), nn.Dropout(0.2))


@seeded
def elements_in_place() -> Case:
    return _conv_net(nn.Dropout(0.3, inplace=True), nn.Dropout(0.2, inplace=True))


@seeded
def channels() -> Case:
    """Whole maps of ``(N, C, H, W)`` at once."""
    return _conv_net(nn.Dropout2d(0.3), nn.Dropout2d(0.2))


@seeded
def channels_of_sequences() -> Case:
    model = nn.Sequential(
        nn.Conv1d(4, WIDTH, 3),
        nn.Dropout1d(0.3),
        nn.SiLU(),
        nn.Conv1d(WIDTH, WIDTH, 3),
        nn.Dropout1d(0.2),
        nn.Conv1d(WIDTH, CLASSES, 1),
    )
    targets = torch.randint(CLASSES, (SAMPLES, 5))
    return Case(model, nn.CrossEntropyLoss(), torch.randn(SAMPLES, 4, 9), targets)


@seeded
def channels_of_volumes() -> Case:
    model = nn.Sequential(
        nn.Conv3d(2, WIDTH, 2),
        nn.Dropout3d(0.3),
        nn.Conv3d(WIDTH, WIDTH, 2),
        nn.Dropout3d(0.2),
        nn.Flatten(),
        nn.Linear(WIDTH, CLASSES),
    )
    return Case(model, nn.CrossEntropyLoss(), torch.randn(SAMPLES, 2, 3, 3, 3), labels())


@seeded
def one_layer_twice() -> Case:
    """Two calls of one layer have two masks."""
    layer = nn.Dropout(0.3)
    return _conv_net(layer, layer)


@seeded
def some_keep_all() -> Case:
    """A layer that drops nothing, and one in eval mode, between two that drop."""
    keep = (nn.Dropout(0.0), nn.Dropout(0.9).eval())
    return _conv_net(nn.Dropout(0.3), nn.Sequential(*keep, nn.Dropout(0.2)))


@seeded
def channels_last() -> Case:
    case = _conv_net(nn.Dropout(0.3), nn.Dropout(0.2))
    return Case(
        case.model.to(memory_format=torch.channels_last),
        case.loss_fn,
        case.inputs.to(memory_format=torch.channels_last),
        case.targets,
    )


class DropPath(nn.Module):
    """Stochastic depth as timm writes it: a sample keeps a branch or drops it (Huang et al. 2016)."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep = 1 - self.drop_prob
        mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep)
        return x * mask.div_(keep)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.SiLU())
        self.drop_path = DropPath(0.4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.branch(x))


@seeded
def stochastic_depth() -> Case:
    return _conv_net(Residual(), Residual())


class Frames(nn.Module):
    """Frames of a film are folded into the first dimension, ``(N * T, C)``."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, WIDTH)
        self.frame_dropout, self.film_dropout = nn.Dropout(0.3), nn.Dropout(0.2)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, films: Tensor) -> Tensor:
        frames = self.frame_dropout(functional.silu(self.embed(films.flatten(0, 1))))
        return self.head(self.film_dropout(frames.unflatten(0, films.shape[:2]).mean(1)))


@seeded
def folded_samples() -> Case:
    return Case(Frames(), nn.CrossEntropyLoss(), torch.randn(SAMPLES, 4, 6), labels())
