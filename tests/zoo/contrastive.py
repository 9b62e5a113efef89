"""Two towers that embed pictures and texts, for losses over all pairs of the large batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import contrastive_losses as losses
from .case import SAMPLES, Case, images, seeded

WIDTH = 8
VOCABULARY = 13


class PictureTower(nn.Sequential):
    def __init__(self, norm: Callable[[int], nn.Module], dropout: float) -> None:
        super().__init__(
            nn.Conv2d(3, 6, 3, stride=2, bias=False),
            norm(6),
            nn.SiLU(),
            nn.Conv2d(6, 12, 3, bias=False),
            norm(12),
            nn.SiLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(12, WIDTH),
        )


class TextTower(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.EmbeddingBag(VOCABULARY, 12)
        self.head = nn.Sequential(
            nn.LayerNorm(12),
            nn.Linear(12, 12),
            nn.SiLU(),
            nn.Dropout(dropout),
            nn.Linear(12, WIDTH),
        )

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embedding(tokens))


class TwoTowers(nn.Module):
    """Returns a dict; the learned scale and bias are in it, and have no samples."""

    def __init__(self, norm: Callable[[int], nn.Module], dropout: float = 0.0) -> None:
        super().__init__()
        self.picture = PictureTower(norm, dropout)
        self.text = TextTower(dropout)
        self.log_scale = nn.Parameter(torch.tensor(1.5))
        self.bias = nn.Parameter(torch.tensor(-2.0))

    def forward(self, image: Tensor, text: Tensor) -> dict[str, Tensor]:
        return {
            "image": self.picture(image),
            "text": self.text(text),
            "scale": self.log_scale.exp(),
            "bias": self.bias,
        }


def group_norm(width: int) -> nn.Module:
    return nn.GroupNorm(2, width)


def _two_towers(
    loss_fn: Callable[..., Any], norm: Callable[[int], nn.Module], dropout: float = 0.0
) -> Case:
    inputs = {"image": images(10), "text": torch.randint(VOCABULARY, (SAMPLES, 6))}
    return Case(TwoTowers(norm, dropout), loss_fn, inputs, torch.arange(SAMPLES))


@seeded
def info_nce() -> Case:
    return _two_towers(losses.info_nce, group_norm)


@seeded
def info_nce_batch_norm() -> Case:
    return _two_towers(losses.info_nce, nn.BatchNorm2d)


@seeded
def info_nce_dropout() -> Case:
    return _two_towers(losses.info_nce, nn.BatchNorm2d, dropout=0.2)


@seeded
def siglip() -> Case:
    return _two_towers(losses.siglip, group_norm)


@seeded
def barlow_twins() -> Case:
    return _two_towers(losses.barlow_twins, nn.BatchNorm2d)


class InfoNCE(nn.Module):
    """The temperature is the loss's own parameter, not the model's."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, outputs: tuple[Tensor, Tensor], targets: Any) -> Tensor:
        image, text = outputs
        return losses.info_nce(
            {"image": image, "text": text, "scale": self.log_scale.exp()}, targets
        )


class TwoViews(nn.Module):
    """One tower for two views of each sample, returned as a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = PictureTower(nn.BatchNorm2d, dropout=0.0)

    def forward(self, views: Tensor) -> tuple[Tensor, Tensor]:
        return self.tower(views[:, 0]), self.tower(views[:, 1])


@seeded
def temperature_in_loss() -> Case:
    views = torch.stack([images(10), images(10)], 1)
    return Case(TwoViews(), InfoNCE(), views, torch.arange(SAMPLES))


@seeded
def batch_hard_triplet() -> Case:
    return Case(
        PictureTower(group_norm, dropout=0.0),
        losses.batch_hard_triplet,
        images(10),
        torch.arange(SAMPLES) % 4,
    )
