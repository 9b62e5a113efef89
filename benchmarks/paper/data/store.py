"""Decoded samples on disk, to be memory-mapped: each image is decoded once for all runs."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .dataset import Damage, Split

# An image uint8 [C, H, W] and its target, an integer or uint8 [H, W].
Sample = tuple[NDArray[np.uint8], Any]

_IMAGES, _TARGETS, _META = "images.npy", "targets.npy", "meta.json"


@dataclass(frozen=True)
class Store:
    """A folder of memory-mapped arrays.

    Args:
        folder: made where it is not there.
    """

    folder: Path

    def split(
        self,
        identity: dict[str, Any],
        count: int,
        image_shape: tuple[int, int, int],
        target_shape: tuple[int, ...],
        samples: Callable[[Damage], Iterator[Sample]],
        damage: Damage,
    ) -> Split:
        """What was decoded before, or else is decoded now.

        Args:
            identity: what the samples depend on: files with their sizes and times, and settings.
            count: of samples, at most.
            image_shape: ``(C, H, W)``.
            target_shape: ``()`` for a label, ``(H, W)`` for a label per pixel.
            samples: yields images uint8 and targets, and reports damaged ones to what it is given.
            damage: learns how many samples are left out.
        """
        digest = hashlib.sha256(
            json.dumps([identity, image_shape, damage.skip], sort_keys=True).encode()
        ).hexdigest()[:16]
        place = self.folder / f"{identity['name']}-{identity['split']}-{digest}"
        if not (place / _META).is_file():
            self._decode(place, count, image_shape, target_shape, samples, Damage(damage.skip))
        meta = json.loads((place / _META).read_text())
        damage.skipped += meta["skipped"]
        damage.files += meta["files"]
        images, targets = (
            np.load(place / name, mmap_mode="r")[: meta["count"]] for name in (_IMAGES, _TARGETS)
        )
        return Split(images, targets)

    def _decode(
        self,
        place: Path,
        count: int,
        image_shape: tuple[int, int, int],
        target_shape: tuple[int, ...],
        samples: Callable[[Damage], Iterator[Sample]],
        damage: Damage,
    ) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        # In a folder of another name until it is whole: a killed run leaves no half a data set.
        work = Path(tempfile.mkdtemp(prefix=f".{place.name}-", dir=self.folder))
        try:
            images = np.lib.format.open_memmap(
                work / _IMAGES, mode="w+", dtype=np.uint8, shape=(count, *image_shape)
            )
            targets = np.lib.format.open_memmap(
                work / _TARGETS,
                mode="w+",
                dtype=np.uint8 if target_shape else np.int64,
                shape=(count, *target_shape),
            )
            written = 0
            for image, target in samples(damage):
                images[written], targets[written] = image, target
                written += 1
            images.flush()
            targets.flush()
            meta = {"count": written, "skipped": damage.skipped, "files": damage.files}
            (work / _META).write_text(json.dumps(meta))
            os.replace(work, place)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise


def identities(paths: Iterable[Path]) -> Sequence[tuple[str, int, int]]:
    """Names, sizes in bytes and times of change of files: other files, another identity."""
    stats = ((path, path.stat()) for path in paths)
    return [(str(path.resolve()), stat.st_size, stat.st_mtime_ns) for path, stat in stats]
