"""Find and load Fashion-MNIST: 28 x 28 grey images of 10 classes.

Source: Xiao, Rasul, Vollgraf, arXiv 1708.07747. The full set (60,000 + 10,000 images) is used where
its four idx files are found; else the class-balanced slice of real images that ships with the
package. No network is touched.
"""

from __future__ import annotations

import gzip
import importlib.resources
import os
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

ENVIRONMENT_VARIABLE = "SBP_FAST_FASHION_MNIST"
# Where Debian's package dataset-fashion-mnist installs the original files.
SYSTEM_DIRECTORY = Path("/usr/share/datasets/fashion-mnist")
SLICE_NAME = "fashion_mnist_slice.npz"

TRAIN_IMAGES = "train-images-idx3-ubyte.gz"
TRAIN_LABELS = "train-labels-idx1-ubyte.gz"
TEST_IMAGES = "t10k-images-idx3-ubyte.gz"
TEST_LABELS = "t10k-labels-idx1-ubyte.gz"
FILES = (TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS)

PIXELS = (28, 28)
CLASSES = 10
CURE = (
    "Fetch the file again (Debian: apt-get install --reinstall dataset-fashion-mnist), "
    "or use the slice that ships with sbp_fast by naming no directory."
)


@dataclass(frozen=True)
class FashionMnist:
    """Images: uint8 [N, 28, 28], 0..255. Labels: int64 [N], 0..9. All tensors lie on the host."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    source: str

    def describe(self) -> str:
        """One line for people: which data this is, and where it came from."""
        return (
            f"Fashion-MNIST, {self.source}: "
            f"{len(self.train_labels):,} training and {len(self.test_labels):,} test images"
        )


def load_fashion_mnist(directory: str | os.PathLike[str] | None = None) -> FashionMnist:
    """The full set from the first place named (see `find_directory`), else the slice.

    Raises FileNotFoundError if a named directory lacks one of the four files, ValueError if a file
    is damaged.
    """
    found = find_directory(directory)
    return load_slice() if found is None else load_directory(found)


def find_directory(directory: str | os.PathLike[str] | None = None) -> Path | None:
    """Where the full set is: `directory`, $SBP_FAST_FASHION_MNIST, or Debian's place; None: nowhere.

    A place that was named must hold the files: FileNotFoundError tells which are
    missing. Debian's place was not named by anybody, so it is passed over unless it holds all four.
    """
    named = directory if directory is not None else os.environ.get(ENVIRONMENT_VARIABLE) or None
    if named is None:
        return None if missing_files(SYSTEM_DIRECTORY) else SYSTEM_DIRECTORY
    missing = missing_files(Path(named))
    if missing:
        origin = "the directory given" if directory is not None else f"${ENVIRONMENT_VARIABLE}"
        raise FileNotFoundError(
            f"{os.fspath(named)!r} ({origin}) does not hold {', '.join(missing)}. "
            f"Expected Fashion-MNIST's four files {', '.join(FILES)}; "
            "name the directory that holds them, or none to use the slice that ships with sbp_fast."
        )
    return Path(named)


def missing_files(directory: Path) -> list[str]:
    """The names among the four that `directory` lacks."""
    return [name for name in FILES if not (directory / name).is_file()]


def load_directory(directory: Path) -> FashionMnist:
    """The full set from its four idx files."""
    train_images, train_labels = load_part(directory / TRAIN_IMAGES, directory / TRAIN_LABELS)
    test_images, test_labels = load_part(directory / TEST_IMAGES, directory / TEST_LABELS)
    return FashionMnist(
        to_images(train_images),
        to_labels(train_labels),
        to_images(test_images),
        to_labels(test_labels),
        source=f"full set from {directory}",
    )


def load_slice() -> FashionMnist:
    """The slice that ships with the package: 900 training and 200 test images of each class."""
    resource = importlib.resources.files(__package__).joinpath(SLICE_NAME)
    with resource.open("rb") as file, numpy.load(file) as arrays:
        return FashionMnist(
            to_images(arrays["train_images"]),
            to_labels(arrays["train_labels"]),
            to_images(arrays["test_images"]),
            to_labels(arrays["test_labels"]),
            source="slice shipped with sbp_fast",
        )


def load_part(
    images_path: Path, labels_path: Path
) -> tuple[NDArray[numpy.uint8], NDArray[numpy.uint8]]:
    """Images uint8 [N, 28, 28] and labels uint8 [N] of one part; ValueError if they do not fit."""
    images, labels = read_idx(images_path, 3), read_idx(labels_path, 1)
    if images.shape[1:] != PIXELS:
        raise ValueError(
            f"{images_path}: images of {images.shape[1]} x {images.shape[2]} pixels, "
            f"expected 28 x 28. {CURE}"
        )
    if len(images) != len(labels):
        raise ValueError(
            f"{labels_path}: {len(labels):,} labels, expected {len(images):,}, "
            f"one for each image in {images_path.name}. {CURE}"
        )
    if len(labels) and labels.max() >= CLASSES:
        raise ValueError(f"{labels_path}: label {labels.max()}, expected 0..{CLASSES - 1}. {CURE}")
    return images, labels


def read_idx(path: Path, dimensions: int) -> NDArray[numpy.uint8]:
    """A gzipped idx file of unsigned bytes as an array with `dimensions` axes.

    The format (LeCun's for MNIST): two zero bytes, the type (0x08: unsigned byte), the number of
    axes, each axis's length as a big-endian 32-bit integer, then the bytes. Raises ValueError if
    the file is not all of that.
    """
    try:
        with gzip.open(path, "rb") as file:
            content = file.read()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(
            f"{path}: expected a whole gzip file, found a damaged one ({error}). {CURE}"
        ) from error
    expected_magic = bytes((0, 0, 8, dimensions))
    header_bytes = 4 + 4 * dimensions
    if content[:4] != expected_magic or len(content) < header_bytes:
        raise ValueError(
            f"{path}: begins with 0x{content[:4].hex()}, expected an idx file of unsigned bytes "
            f"with {dimensions} axes: 0x{expected_magic.hex()} and {dimensions} lengths. {CURE}"
        )
    shape = tuple(int(length) for length in numpy.frombuffer(content, ">u4", dimensions, offset=4))
    expected_bytes = int(numpy.prod(shape, dtype=numpy.int64))
    if len(content) - header_bytes != expected_bytes:
        raise ValueError(
            f"{path}: {len(content) - header_bytes:,} bytes of data, expected {expected_bytes:,} "
            f"for the shape {shape} that it declares. {CURE}"
        )
    return numpy.frombuffer(content, numpy.uint8, offset=header_bytes).reshape(shape)


def to_images(array: NDArray[numpy.uint8]) -> Tensor:
    # A copy: the array is read-only where it is a view of the file's bytes.
    return torch.from_numpy(array.copy())


def to_labels(array: NDArray[numpy.uint8]) -> Tensor:
    return torch.from_numpy(array.astype(numpy.int64))
