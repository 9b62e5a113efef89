"""What every loader returns, and what it raises."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


class MissingDataError(FileNotFoundError):
    """A data set is not where it was looked for; the message says where to get it, and which flag names
    its folder."""


class DamagedFileError(ValueError):
    """A file is truncated or mislabelled; the message names it."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(
            f"{path}: {reason}; fetch the file again, or leave such samples out with --skip-damaged"
        )


@dataclass(frozen=True)
class Split:
    """Training or test samples, memory-mapped.

    Attributes:
        images: uint8 [N, C, H, W], 0..255.
        targets: int64 [N], or for segmentation uint8 [N, H, W]; classes from 0.
    """

    images: NDArray[np.uint8]
    targets: NDArray[np.int64] | NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class Dataset:
    """A data set.

    Attributes:
        name: as the command line has it.
        classes: how many there are.
        source: where the files lie, for people.
        skipped: files or records left out because they are damaged.
    """

    name: str
    train: Split
    test: Split
    classes: int
    source: str
    skipped: int = 0

    def describe(self) -> str:
        """One line for people: which data, how much, and what was left out."""
        channels, height, width = self.train.images.shape[1:]
        text = (
            f"{self.name} from {self.source}: {len(self.train):,} training and {len(self.test):,} test "
            f"images of {channels} x {height} x {width}, {self.classes} classes"
        )
        return f"{text}, {self.skipped} damaged files or records left out" if self.skipped else text


@dataclass
class Damage:
    """Decides what becomes of a damaged file: it ends the loading, or is counted and left out."""

    skip: bool
    skipped: int = 0
    files: list[str] = field(default_factory=list)

    def found(self, path: Path, reason: str) -> None:
        """Raises DamagedFileError, unless damaged files are to be left out."""
        if not self.skip:
            raise DamagedFileError(path, reason)
        self.skipped += 1
        self.files.append(f"{path}: {reason}")


def require(
    folder: Path | None, entries: tuple[str, ...], name: str, origin: str, flag: str
) -> Path:
    """The folder, if it holds all entries.

    Args:
        folder: as the flag gave it; None: it was not given.
        entries: files and folders that it must hold.
        origin: where the data set can be had.
        flag: of the command line, which names the folder.

    Raises:
        MissingDataError: it was not given, or lacks an entry.
    """
    expected = f"{', '.join(entries)}; get it from {origin}"
    if folder is None:
        raise MissingDataError(
            f"{name} needs a folder: name it with {flag} FOLDER, where FOLDER holds {expected}"
        )
    missing = [entry for entry in entries if not (folder / entry).exists()]
    if missing:
        raise MissingDataError(
            f"{flag} {folder}: no {', '.join(missing)} there; {name} is expected to hold {expected}"
        )
    return folder
