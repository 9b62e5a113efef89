"""Fashion-MNIST for classification: the full set where it is installed, else the slice that ships."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sbp_fast.data import FashionMnist, load_fashion_mnist

from .dataset import Damage, Dataset
from .store import Sample, Store

NAME = "fashion-mnist"
_PIXELS = 28


def load(folder: Path | None, store: Store, pixels: int, *, skip_damaged: bool) -> Dataset:
    """Images [N, 1, pixels, pixels], in a frame of zeros.

    Source: Xiao, Rasul, Vollgraf, arXiv 1708.07747.

    Args:
        folder: of the four original files; None: where Debian's package ``dataset-fashion-mnist``
            installs them, else the slice.
        pixels: 28 or more.
        skip_damaged: makes no difference: the files are whole, or they are refused.

    Raises:
        FileNotFoundError: the folder lacks a file.
        ValueError: a file is damaged, or ``pixels`` is below 28.
    """
    if pixels < _PIXELS:
        raise ValueError(
            f"{NAME} at {pixels} pixels; its images have {_PIXELS} and are not shrunk: choose "
            f"{_PIXELS} or more"
        )
    data = load_fashion_mnist(folder)
    margin = pixels - _PIXELS
    before = margin // 2
    frame = ((before, margin - before), (before, margin - before))

    def samples(
        images: NDArray[np.uint8], labels: NDArray[np.int64], _: Damage
    ) -> Iterator[Sample]:
        for image, label in zip(images, labels, strict=True):
            yield np.pad(image, frame)[None], label

    train, test = (
        store.split(
            {"name": NAME, "split": split, "source": source_of(data)},
            len(labels),
            (1, pixels, pixels),
            (),
            partial(samples, images.numpy(), labels.numpy()),
            Damage(skip_damaged),
        )
        for split, images, labels in (
            ("train", data.train_images, data.train_labels),
            ("test", data.test_images, data.test_labels),
        )
    )
    return Dataset(NAME, train, test, 10, data.source)


def source_of(data: FashionMnist) -> list[object]:
    """What distinguishes one set from another: where it lies, and its first and last images."""
    ends = [
        int(images[i].sum()) for images in (data.train_images, data.test_images) for i in (0, -1)
    ]
    return [data.source, len(data.train_labels), len(data.test_labels), *ends]
