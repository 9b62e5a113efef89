"""Masks of per-sample dropout by an implementation of their own, in NumPy.

Philox4x32-10 (Salmon et al. 2011) as its paper gives it, and the contract of ``sbp_fast.ops.dropout``.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

Words = np.ndarray  # of uint64, so that products of 32-bit numbers fit


def philox(counter: tuple[Words, Words, Words, Words], key: tuple[int, int]) -> list[Words]:
    low = np.uint64(0xFFFFFFFF)
    shift = np.uint64(32)
    c = [np.asarray(word, dtype=np.uint64) & low for word in counter]
    k = [np.uint64(word) for word in key]
    for _ in range(10):
        first, second = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [
            (second >> shift) ^ c[1] ^ k[0],
            second & low,
            (first >> shift) ^ c[3] ^ k[1],
            first & low,
        ]
        k = [(k[0] + np.uint64(0x9E3779B9)) & low, (k[1] + np.uint64(0xBB67AE85)) & low]
    return c


def keep_mask(probability: float, *, seed: int, call: int, samples: range, elements: int) -> Tensor:
    """Of shape ``(samples, elements)``: 1.0 where a sample's element is kept, else 0.0."""
    element, sample = np.meshgrid(np.arange(elements), np.array(samples))
    words = philox(
        (
            element // 4,
            np.full_like(element, call),
            sample & 0xFFFFFFFF,
            sample >> 32,
        ),
        (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF),
    )
    drawn = np.choose(element % 4, words)
    return torch.from_numpy((drawn >= np.uint64(round(probability * 2**32))).astype(np.float64))
