"""Scenes for segmentation, composed of Fashion-MNIST's garments, with a label for every pixel."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sbp_fast.data import load_fashion_mnist

from .dataset import Damage, Dataset
from .fashion_mnist import source_of
from .store import Sample, Store

NAME = "fashion-scenes"
# Background, and the ten kinds of garments.
CLASSES = 11
_GARMENTS = 4
# Garments are shrunk to half their 28 pixels, so that several fit beside each other.
_SIDE = 14
# What is darker than this (of 255) is background.
_THRESHOLD = 40


def load(folder: Path | None, store: Store, pixels: int, *, skip_damaged: bool) -> Dataset:
    """As many scenes [N, 1, pixels, pixels] as there are images, each of one to four garments.

    A garment lies where it was drawn to lie, on top of those before it; the same scenes at every call.
    Arguments and errors are those of :func:`benchmarks.paper.data.fashion_mnist.load`; ``pixels`` is at
    least 14.
    """
    if pixels < _SIDE:
        raise ValueError(
            f"{NAME} at {pixels} pixels; a garment has {_SIDE}: choose {_SIDE} or more"
        )
    data = load_fashion_mnist(folder)
    train, test = (
        store.split(
            {"name": NAME, "split": split, "source": source_of(data)},
            len(labels),
            (1, pixels, pixels),
            (pixels, pixels),
            partial(_scenes, images.numpy(), labels.numpy(), pixels, seed),
            Damage(skip_damaged),
        )
        for seed, (split, images, labels) in enumerate(
            (
                ("train", data.train_images, data.train_labels),
                ("test", data.test_images, data.test_labels),
            )
        )
    )
    return Dataset(NAME, train, test, CLASSES, data.source)


def _scenes(
    images: NDArray[np.uint8], labels: NDArray[np.int64], pixels: int, seed: int, _: Damage
) -> Iterator[Sample]:
    generator = np.random.default_rng(seed)
    # Means of 2 x 2 pixels.
    small = images.reshape(-1, _SIDE, 2, _SIDE, 2).mean((2, 4)).astype(np.uint8)
    for _count in range(len(labels)):
        scene = np.zeros((pixels, pixels), np.uint8)
        classes = np.zeros((pixels, pixels), np.uint8)
        for _garment in range(generator.integers(1, _GARMENTS + 1)):
            chosen = generator.integers(len(labels))
            top, left = generator.integers(0, pixels - _SIDE + 1, 2)
            place = (slice(top, top + _SIDE), slice(left, left + _SIDE))
            seen = small[chosen] > _THRESHOLD
            scene[place][seen] = small[chosen][seen]
            classes[place][seen] = labels[chosen] + 1
        yield scene[None], classes
