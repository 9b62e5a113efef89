"""Oxford's 102 flowers: a folder of JPEG files, and labels in two files of MATLAB's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..extra import import_bench
from .dataset import Damage, DamagedFileError, Dataset, Split, require
from .decode import read_image
from .store import Sample, Store, identities

NAME = "flower-102"
CLASSES = 102
ORIGIN = (
    "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/ (102flowers.tgz and the two .mat files)"
)
_LABELS, _SETS = "imagelabels.mat", "setid.mat"


def load(
    flag: str, folder: Path | None, store: Store, pixels: int, *, skip_damaged: bool
) -> Dataset:
    """Images [N, 3, pixels, pixels]: the middle square. 8,189 images in all.

    Source: Nilsback, Zisserman, "Automated Flower Classification over a Large Number of Classes", 2008.
    Trained on its training and validation sets (2,040 images), tested on its test set (6,149).

    Args:
        flag: names the folder on the command line.
        folder: holds ``jpg/image_00001.jpg`` and so on, ``imagelabels.mat`` and ``setid.mat``.

    Raises:
        MissingDataError: one of them is not there.
        DamagedFileError: an image is no whole one or not there, or its label is none; not if
            ``skip_damaged``. A ``.mat`` file that cannot be read raises it in any case.
        ImportError: Pillow or SciPy is not installed.
    """
    found = require(folder, ("jpg", _LABELS, _SETS), NAME, ORIGIN, flag)
    labels = _numbers(found / _LABELS, "labels")
    damage = Damage(skip_damaged)
    train, test = (
        _load_split(
            split,
            found,
            labels,
            np.concatenate([_numbers(found / _SETS, key) for key in keys]),
            store,
            pixels,
            damage,
        )
        for split, keys in (("train", ("trnid", "valid")), ("test", ("tstid",)))
    )
    return Dataset(NAME, train, test, CLASSES, str(found), damage.skipped)


def _numbers(path: Path, key: str) -> NDArray[np.int64]:
    reader = import_bench("scipy.io", "SciPy")
    try:
        return np.asarray(reader.loadmat(path)[key], np.int64).ravel()
    # What a damaged file makes of SciPy's reader, which has no error of its own for it.
    except (KeyError, NotImplementedError, OSError, TypeError, ValueError) as error:
        raise DamagedFileError(path, f"no MATLAB file with {key!r} in it ({error})") from error


def _load_split(
    split: str,
    folder: Path,
    labels: NDArray[np.int64],
    numbers: NDArray[np.int64],
    store: Store,
    pixels: int,
    damage: Damage,
) -> Split:
    paths = [folder / "jpg" / f"image_{number:05d}.jpg" for number in numbers]
    return store.split(
        {
            **{"name": NAME, "split": split, "labels": labels.tolist()},
            "files": identities(path for path in paths if path.is_file()),
        },
        len(numbers),
        (3, pixels, pixels),
        (),
        partial(_samples, paths, numbers, labels, pixels),
        damage,
    )


def _samples(
    paths: Sequence[Path],
    numbers: NDArray[np.int64],
    labels: NDArray[np.int64],
    pixels: int,
    damage: Damage,
) -> Iterator[Sample]:
    for path, number in zip(paths, numbers, strict=True):
        label = int(labels[number - 1]) if 1 <= number <= len(labels) else 0
        if not 1 <= label <= CLASSES:
            damage.found(path, f"its label in {_LABELS} is {label}, expected 1..{CLASSES}")
            continue
        image = read_image(path, pixels, damage)
        if image is not None:
            yield image, label - 1
