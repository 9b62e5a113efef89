"""Make the slice of Fashion-MNIST that ships with sbp_fast, from the four original idx files.

    python examples/data/make_fashion_mnist_slice.py DIRECTORY

DIRECTORY holds the originals (Debian: /usr/share/datasets/fashion-mnist). The slice is the first
900 training and the first 200 test images of each class, in the original order; the same input
gives the same bytes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy
from numpy.typing import NDArray

import sbp_fast.data
from sbp_fast.data import fashion_mnist

TRAIN_PER_CLASS = 900
TEST_PER_CLASS = 200
LIMIT_BYTES = 5_000_000


def balanced(labels: NDArray[numpy.uint8], per_class: int) -> NDArray[numpy.intp]:
    """Ascending indices of the first `per_class` samples of each class; labels: uint8 [N]."""
    chosen = [
        numpy.flatnonzero(labels == label)[:per_class] for label in range(fashion_mnist.CLASSES)
    ]
    counts = [len(indices) for indices in chosen]
    if min(counts) < per_class:
        raise ValueError(
            f"{min(counts)} images of class {counts.index(min(counts))}, "
            f"expected at least {per_class}: use the full Fashion-MNIST"
        )
    return numpy.sort(numpy.concatenate(chosen))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, help="holds the four original idx .gz files")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(sbp_fast.data.__file__).with_name(fashion_mnist.SLICE_NAME),
    )
    arguments = parser.parse_args()
    arrays = {}
    for part, images_name, labels_name, per_class in (
        ("train", fashion_mnist.TRAIN_IMAGES, fashion_mnist.TRAIN_LABELS, TRAIN_PER_CLASS),
        ("test", fashion_mnist.TEST_IMAGES, fashion_mnist.TEST_LABELS, TEST_PER_CLASS),
    ):
        images, labels = fashion_mnist.load_part(
            arguments.directory / images_name, arguments.directory / labels_name
        )
        indices = balanced(labels, per_class)
        arrays[f"{part}_images"] = images[indices]
        arrays[f"{part}_labels"] = labels[indices]
    numpy.savez_compressed(arguments.output, **arrays)
    size = arguments.output.stat().st_size
    if size > LIMIT_BYTES:
        raise SystemExit(f"{arguments.output}: {size:,} bytes, expected at most {LIMIT_BYTES:,}")
    print(f"{arguments.output}: {size:,} bytes")


if __name__ == "__main__":
    main()
