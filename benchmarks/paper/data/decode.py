"""JPEG, PNG and GIF files as arrays."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..extra import import_bench
from .dataset import Damage


def read_image(path: Path, pixels: int, damage: Damage) -> NDArray[np.uint8] | None:
    """RGB, uint8 [3, pixels, pixels]: the largest square in the middle, resampled.

    None where the file cannot be read and damaged files are left out. Raises DamagedFileError otherwise,
    ImportError without Pillow.
    """
    return _read(path, "RGB", pixels, damage)


def read_mask(path: Path, pixels: int, damage: Damage) -> NDArray[np.uint8] | None:
    """As :func:`read_image`, a mask: uint8 [pixels, pixels], 1 where the file is nearer to white."""
    mask = _read(path, "L", pixels, damage)
    return None if mask is None else (mask[0] > 127).astype(np.uint8)


def size_of(path: Path, damage: Damage) -> tuple[int, int] | None:
    """Width and height in pixels, from the file's head; None as in :func:`read_image`."""
    images = import_bench("PIL.Image", "Pillow")
    try:
        with images.open(path) as image:
            width, height = image.size
    except (OSError, SyntaxError, ValueError) as error:
        damage.found(path, f"no image that can be read ({error})")
        return None
    return width, height


def _read(path: Path, mode: str, pixels: int, damage: Damage) -> NDArray[np.uint8] | None:
    images = import_bench("PIL.Image", "Pillow")
    try:
        with images.open(path) as image:
            width, height = image.size
            side = min(width, height)
            left, top = (width - side) // 2, (height - side) // 2
            square = image.convert(mode).resize(
                (pixels, pixels),
                # Between two classes there is none: masks are not blended.
                images.Resampling.NEAREST if mode == "L" else images.Resampling.BILINEAR,
                box=(left, top, left + side, top + side),
            )
    except (OSError, SyntaxError, ValueError) as error:
        damage.found(path, f"no whole image ({error})")
        return None
    array = np.asarray(square, np.uint8)
    return array[None] if array.ndim == 2 else np.ascontiguousarray(array.transpose(2, 0, 1))
