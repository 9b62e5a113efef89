"""What the dropout op demands of its arguments, and the shape it returns."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import GRADIENT_DTYPES


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
    if not 0.0 <= probability <= 1.0:
        raise RuntimeError(f"{op}: probability is {probability}; it must be between 0 and 1")
    return torch.empty_like(input)
