"""Dropout's masks written once more, in numpy's 64-bit integers, by the words of the contract alone."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

# Random123's tests/kat_vectors, "philox4x32 10": counter, key, result.
KNOWN_ANSWERS = (
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (0xFFFFFFFF,) * 4,
        (0xFFFFFFFF,) * 2,
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)

_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


def philox(counter: list[np.ndarray], key: tuple[int, int]) -> list[np.ndarray]:
    """Philox4x32-10 of uint64 arrays that hold 32-bit words."""
    c0, c1, c2, c3 = counter
    for round_ in range(10):
        k0 = np.uint64((key[0] + round_ * 0x9E3779B9) % 2**32)
        k1 = np.uint64((key[1] + round_ * 0xBB67AE85) % 2**32)
        p0, p1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (p1 >> _SHIFT) ^ c1 ^ k0, p1 & _LOW, (p0 >> _SHIFT) ^ c3 ^ k1, p0 & _LOW
    return [c0, c1, c2, c3]


def noise(seed: int, call: int, samples: np.ndarray, elements: np.ndarray) -> np.ndarray:
    """uint64[samples, elements]: the word of each element of each sample."""
    sample, element = np.broadcast_arrays(
        samples.astype(np.uint64)[:, None], elements.astype(np.uint64)[None]
    )
    counter = [
        element // np.uint64(4),
        np.full_like(element, call),
        sample & _LOW,
        sample >> _SHIFT,
    ]
    words = philox(counter, (seed % 2**32, seed // 2**32 % 2**32))
    return np.choose((element % np.uint64(4)).astype(np.int64), words)


def mask(
    shape: torch.Size,
    seed: int,
    call: int,
    first_sample: int,
    outer: int,
    samples: int,
    probability: float,
) -> Tensor:
    """Boolean, true where an element is kept; on the CPU and contiguous."""
    inner = shape.numel() // (outer * samples)
    indices = first_sample + np.arange(samples, dtype=np.uint64)
    words = noise(seed, call, indices, np.arange(outer * inner))
    keep = words >= np.uint64(round(probability * 2**32))
    return torch.from_numpy(keep.reshape(samples, outer, inner).swapaxes(0, 1).copy()).view(shape)
