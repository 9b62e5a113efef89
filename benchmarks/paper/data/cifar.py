"""CIFAR-10 and CIFAR-100, in the binary version: records of bytes, which need no unpickling."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from .dataset import Damage, Dataset, Split, require
from .store import Sample, Store, identities

_PIXELS = 32
_IMAGE_BYTES = 3 * _PIXELS * _PIXELS


@dataclass(frozen=True)
class _Format:
    """``label_bytes``: before each image; the last of them is the label."""

    name: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    label_bytes: int
    classes: int
    origin: str


CIFAR_10 = _Format(
    "cifar-10",
    tuple(f"data_batch_{number}.bin" for number in range(1, 6)),
    ("test_batch.bin",),
    1,
    10,
    "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
)
CIFAR_100 = _Format(
    "cifar-100",
    ("train.bin",),
    ("test.bin",),
    2,
    100,
    "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
)


def load(
    kind: _Format, flag: str, folder: Path | None, store: Store, pixels: int, *, skip_damaged: bool
) -> Dataset:
    """Images [N, 3, 32, 32].

    Source: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009; the page of the
    data set for the format. For CIFAR-100 the labels are the fine ones.

    Args:
        flag: names the folder on the command line.
        folder: holds the ``.bin`` files.
        pixels: 32.

    Raises:
        MissingDataError: a file is not there.
        DamagedFileError: a file ends within a record, or a label is none; not if ``skip_damaged``.
        ValueError: ``pixels`` is not 32.
    """
    if pixels != _PIXELS:
        raise ValueError(
            f"{kind.name} at {pixels} pixels; its images have {_PIXELS}, and stay as they are"
        )
    found = require(folder, (*kind.train, *kind.test), kind.name, kind.origin, flag)
    damage = Damage(skip_damaged)
    train, test = (
        _load_split(kind, split, [found / name for name in names], store, damage)
        for split, names in (("train", kind.train), ("test", kind.test))
    )
    return Dataset(kind.name, train, test, kind.classes, str(found), damage.skipped)


def _load_split(
    kind: _Format, split: str, paths: Sequence[Path], store: Store, damage: Damage
) -> Split:
    record = kind.label_bytes + _IMAGE_BYTES
    return store.split(
        {"name": kind.name, "split": split, "files": identities(paths)},
        sum(path.stat().st_size // record for path in paths),
        (3, _PIXELS, _PIXELS),
        (),
        partial(_samples, kind, paths),
        damage,
    )


def _samples(kind: _Format, paths: Sequence[Path], damage: Damage) -> Iterator[Sample]:
    record = kind.label_bytes + _IMAGE_BYTES
    for path in paths:
        content = np.fromfile(path, np.uint8)
        whole, rest = divmod(len(content), record)
        if rest:
            damage.found(
                path,
                f"{len(content):,} bytes, expected a multiple of the {record:,} of a record: it ends "
                f"within record {whole}",
            )
        for number, row in enumerate(content[: whole * record].reshape(whole, record)):
            label = int(row[kind.label_bytes - 1])
            if label >= kind.classes:
                damage.found(
                    path, f"record {number} has the label {label}, expected 0..{kind.classes - 1}"
                )
                continue
            yield row[kind.label_bytes :].reshape(3, _PIXELS, _PIXELS), label
