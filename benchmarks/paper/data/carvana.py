"""Pairs of photographs and masks, as in Kaggle's Carvana Image Masking Challenge."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from .dataset import Damage, Dataset, MissingDataError, require
from .decode import read_image, read_mask, size_of
from .store import Sample, Store, identities

NAME = "carvana"
ORIGIN = (
    "https://www.kaggle.com/c/carvana-image-masking-challenge/data (train.zip, train_masks.zip)"
)
# Background and car.
CLASSES = 2
# Every fifth car is for testing: the challenge's own test set has no masks.
_EVERY = 5


def load(
    flag: str, folder: Path | None, store: Store, pixels: int, *, skip_damaged: bool
) -> Dataset:
    """Images [N, 3, pixels, pixels] and masks [N, pixels, pixels]: the middle square.

    All views of a car are either for training or for testing.

    Args:
        flag: names the folder on the command line.
        folder: holds ``train/<car>_<view>.jpg`` and ``train_masks/<car>_<view>_mask.gif``.

    Raises:
        MissingDataError: one of the folders is not there, or cars for training or for testing are not.
        DamagedFileError: an image or a mask is no whole one, the mask is not there, or has another size;
            not if ``skip_damaged``.
        ImportError: Pillow is not installed.
    """
    found = require(folder, ("train", "train_masks"), NAME, ORIGIN, flag)
    paths = sorted((found / "train").glob("*.jpg"))
    cars = sorted({_car(path) for path in paths})
    held_out = set(cars[_EVERY - 1 :: _EVERY])
    damage = Damage(skip_damaged)
    splits = []
    for split, chosen in (
        ("train", [path for path in paths if _car(path) not in held_out]),
        ("test", [path for path in paths if _car(path) in held_out]),
    ):
        if not chosen:
            raise MissingDataError(
                f"{flag} {found}: {len(cars)} cars in train, expected at least {_EVERY}, of which every "
                f"{_EVERY}th is for testing; get {NAME} from {ORIGIN}"
            )
        masks = [_mask(path) for path in chosen]
        splits.append(
            store.split(
                {
                    **{"name": NAME, "split": split},
                    "files": identities([*chosen, *(mask for mask in masks if mask.is_file())]),
                },
                len(chosen),
                (3, pixels, pixels),
                (pixels, pixels),
                partial(_samples, chosen, masks, pixels),
                damage,
            )
        )
    return Dataset(NAME, splits[0], splits[1], CLASSES, str(found), damage.skipped)


def _car(path: Path) -> str:
    return path.stem.rpartition("_")[0]


def _mask(path: Path) -> Path:
    return path.parent.parent / "train_masks" / f"{path.stem}_mask.gif"


def _samples(
    paths: Sequence[Path], masks: Sequence[Path], pixels: int, damage: Damage
) -> Iterator[Sample]:
    for path, mask_path in zip(paths, masks, strict=True):
        sizes = [size_of(one, damage) for one in (path, mask_path)]
        if None in sizes:
            continue
        if sizes[0] != sizes[1]:
            damage.found(mask_path, f"a mask of {sizes[1]} pixels for an image of {sizes[0]}")
            continue
        image, mask = read_image(path, pixels, damage), read_mask(mask_path, pixels, damage)
        if image is not None and mask is not None:
            yield image, mask
