"""Losses that compare samples with one another: none is a sum over samples.

Two views of the same samples are ``outputs["image"]`` and ``outputs["text"]``, both ``(samples, width)``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def info_nce(outputs: dict[str, Tensor], targets: Any) -> Tensor:
    """CLIP's (Radford et al. 2021, figure 3); ``outputs["scale"]`` is the learned inverse temperature."""
    logits = _similarities(outputs) * outputs["scale"]
    pairs = torch.arange(len(logits))
    return (functional.cross_entropy(logits, pairs) + functional.cross_entropy(logits.T, pairs)) / 2


def siglip(outputs: dict[str, Tensor], targets: Any) -> Tensor:
    """A sigmoid for every pair (Zhai et al. 2023, algorithm 1), with a learned scale and bias."""
    logits = _similarities(outputs) * outputs["scale"] + outputs["bias"]
    signs = 2 * torch.eye(len(logits), dtype=logits.dtype) - 1
    return -functional.logsigmoid(signs * logits).sum() / len(logits)


def barlow_twins(outputs: dict[str, Tensor], targets: Any) -> Tensor:
    """Features standardised over the batch, their cross-correlation driven to the identity (Zbontar et
    al. 2021, algorithm 1)."""
    first, second = (
        (view - view.mean(0)) / view.std(0) for view in (outputs["image"], outputs["text"])
    )
    correlation = first.T @ second / len(first)
    diagonal = correlation.diagonal()
    off_diagonal = correlation.square().sum() - diagonal.square().sum()
    return (diagonal - 1).square().sum() + 0.01 * off_diagonal


def batch_hard_triplet(outputs: Tensor, targets: Tensor) -> Tensor:
    """Each sample with its farthest like and its nearest unlike (Hermans et al. 2017, section 2).

    Args:
        outputs: embeddings, ``(samples, width)``.
        targets: labels, ``(samples,)``.
    """
    # Not cdist: its gradient at distance zero is for each version of torch to choose.
    distances = (outputs[:, None] - outputs[None]).square().sum(2)
    alike = targets[:, None] == targets[None]
    farthest = distances.masked_fill(~alike, 0.0).amax(1)
    nearest = distances.masked_fill(alike, float("inf")).amin(1)
    return functional.softplus(farthest - nearest).mean()


def _similarities(outputs: dict[str, Tensor]) -> Tensor:
    image, text = (functional.normalize(outputs[name], dim=1) for name in ("image", "text"))
    return image @ text.T
