"""ImageNet as its archives unpack: a folder per class, for training and for validation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from .dataset import Damage, Dataset, MissingDataError, require
from .decode import read_image
from .store import Sample, Store, identities

NAME = "imagenet"
ORIGIN = "https://image-net.org/download-images (ILSVRC2012, validation images sorted into folders)"
_SUFFIXES = (".jpeg", ".jpg", ".png")


def load(
    flag: str, folder: Path | None, store: Store, pixels: int, *, skip_damaged: bool
) -> Dataset:
    """Images [N, 3, pixels, pixels]: the middle square. Classes are the folders of ``train``, by name.

    Source: Russakovsky et al., "ImageNet Large Scale Visual Recognition Challenge", IJCV 2015.

    Args:
        flag: names the folder on the command line.
        folder: holds ``train/<class>/*.JPEG`` and ``val/<class>/*.JPEG``.

    Raises:
        MissingDataError: one of the two is not there, or holds no image.
        DamagedFileError: an image is no whole one, or is for validation in a class that is not trained;
            not if ``skip_damaged``.
        ImportError: Pillow is not installed.
    """
    found = require(folder, ("train", "val"), NAME, ORIGIN, flag)
    classes = [entry.name for entry in sorted((found / "train").iterdir()) if entry.is_dir()]
    damage = Damage(skip_damaged)
    splits = []
    for split in ("train", "val"):
        paths = sorted(
            path for path in (found / split).glob("*/*") if path.suffix.lower() in _SUFFIXES
        )
        if not paths:
            raise MissingDataError(
                f"{flag} {found}: no image in {split}/<class>/; expected files ending in "
                f"{', '.join(_SUFFIXES)}; get {NAME} from {ORIGIN}"
            )
        splits.append(
            store.split(
                {"name": NAME, "split": split, "classes": classes, "files": identities(paths)},
                len(paths),
                (3, pixels, pixels),
                (),
                partial(_samples, paths, {name: i for i, name in enumerate(classes)}, pixels),
                damage,
            )
        )
    return Dataset(NAME, splits[0], splits[1], len(classes), str(found), damage.skipped)


def _samples(
    paths: Sequence[Path], classes: dict[str, int], pixels: int, damage: Damage
) -> Iterator[Sample]:
    for path in paths:
        name = path.parent.name
        if name not in classes:
            damage.found(path, f"is in the class {name!r}, of which there is no folder in train")
            continue
        image = read_image(path, pixels, damage)
        if image is not None:
            yield image, classes[name]
