"""Data sets by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from . import carvana, cifar, fashion_mnist, fashion_scenes, flower_102, image_folder
from .dataset import Dataset
from .store import Store

# The flags of the command line that name the folders.
CLASSIFICATION_FLAG, SEGMENTATION_FLAG = "--classification-folder", "--segmentation-folder"

_Load = Callable[..., Dataset]

CLASSIFICATION: dict[str, _Load] = {
    fashion_mnist.NAME: fashion_mnist.load,
    cifar.CIFAR_10.name: partial(cifar.load, cifar.CIFAR_10, CLASSIFICATION_FLAG),
    cifar.CIFAR_100.name: partial(cifar.load, cifar.CIFAR_100, CLASSIFICATION_FLAG),
    flower_102.NAME: partial(flower_102.load, CLASSIFICATION_FLAG),
    image_folder.NAME: partial(image_folder.load, CLASSIFICATION_FLAG),
}
SEGMENTATION: dict[str, _Load] = {
    fashion_scenes.NAME: fashion_scenes.load,
    carvana.NAME: partial(carvana.load, SEGMENTATION_FLAG),
}


def load(
    name: str, folder: Path | None, cache: Path, pixels: int, *, skip_damaged: bool = False
) -> Dataset:
    """A data set, decoded into ``cache`` where that is not done yet.

    Args:
        name: a key of :data:`CLASSIFICATION` or :data:`SEGMENTATION`.
        folder: of its files.
        cache: a folder for memory-mapped arrays.
        pixels: height and width of the images.
        skip_damaged: whether samples that cannot be read are left out, and counted.

    Raises:
        ValueError: there is no data set of that name.
        MissingDataError, DamagedFileError, ImportError: as the loaders say.
    """
    loaders = CLASSIFICATION | SEGMENTATION
    if name not in loaders:
        raise ValueError(f"no data set {name!r}; expected one of {', '.join(loaders)}")
    return loaders[name](folder, Store(cache), pixels, skip_damaged=skip_damaged)
