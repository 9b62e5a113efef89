"""What the dropout op demands of its arguments, and the shape it returns."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import GRADIENT_DTYPES

# Groups of four elements, and calls, have 32 bits of Philox's counter each.
MOST_ELEMENTS = 4 << 32
MOST_CALLS = 1 << 32


def fake_dropout(
    input: Tensor,
    seed: int,
    call: int,
    first_sample: int,
    outer: int,
    samples: int,
    probability: float,
) -> Tensor:
    op = "dropout"
    if input.layout is not torch.strided:
        raise RuntimeError(
            f"{op}: input is not in the layout torch.strided; it must be dense, "
            "call .to_dense() on it first"
        )
    if input.dtype not in GRADIENT_DTYPES:
        raise RuntimeError(
            f"{op}: input has dtype {input.dtype}; it must be one of "
            + ", ".join(str(dtype) for dtype in GRADIENT_DTYPES)
        )
    if outer < 1 or samples < 1 or input.numel() % (outer * samples):
        raise RuntimeError(
            f"{op}: input has {input.numel()} elements, which are not outer={outer} times "
            f"samples={samples} times a whole number"
        )
    if input.numel() // samples > MOST_ELEMENTS:
        raise RuntimeError(
            f"{op}: a sample has {input.numel() // samples} elements; it must have at most "
            f"{MOST_ELEMENTS}, which is what a counter of 32 bits can tell apart"
        )
    if not 0 <= call < MOST_CALLS:
        raise RuntimeError(f"{op}: call is {call}; it must be from 0 to {MOST_CALLS - 1}")
    if first_sample < 0:
        raise RuntimeError(f"{op}: first_sample is {first_sample}; it must be 0 or more")
    if not 0.0 <= probability <= 1.0:
        raise RuntimeError(f"{op}: probability is {probability}; it must be between 0 and 1")
    return torch.empty_like(input)
