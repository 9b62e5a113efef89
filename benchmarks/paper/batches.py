"""Large batches in the order of a seed, from memory-mapped arrays."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .data import Split


def as_tensors(split: Split, chosen: slice | NDArray[np.int64]) -> tuple[Tensor, Tensor]:
    """Images uint8 [n, C, H, W] and targets int64 [n] or [n, H, W], copied to host memory."""
    # A memory map is read here, and nowhere else.
    images, targets = np.array(split.images[chosen]), np.array(split.targets[chosen], np.int64)
    return torch.from_numpy(images), torch.from_numpy(targets)


def large_batches(split: Split, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless large batches; epoch after epoch, each in a new order.

    What is left of an epoch, less than a batch, is dropped.

    Raises:
        ValueError: the split has less than one batch.
    """
    if size > len(split):
        raise ValueError(
            f"a batch of {size} samples, but the data set has {len(split)} to train with; choose a "
            "larger data set or leave out this batch size"
        )
    generator = np.random.default_rng(seed)
    while True:
        order = generator.permutation(len(split))
        for start in range(0, len(split) - size + 1, size):
            yield as_tensors(split, order[start : start + size])
