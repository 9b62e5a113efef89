"""The contenders' calls: each computes the same thing in somebody's way."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .. import ops
from .tensor_lists import TensorSets
from .timing import Call

# Factor on every gradient: a sum over thousands of calls stays finite.
SCALE = 1e-3

_MAX_NORM = 1.0


def ours_accumulate(
    sets: TensorSets, backend: str, *, statistics: Tensor | None, first_write: bool = False
) -> Call:
    def call(index: int) -> None:
        ops.scale_accumulate_(
            sets[index].accumulators,
            sets[index].gradients,
            SCALE,
            first_write=first_write,
            statistics=statistics,
            backend=backend,
        )

    return call


def ours_zero_and_add(sets: TensorSets, backend: str, statistics: Tensor) -> Call:
    add = ours_accumulate(sets, backend, statistics=statistics)

    def call(index: int) -> None:
        torch._foreach_zero_(sets[index].accumulators)
        add(index)

    return call


def ours_finalise(sets: TensorSets, backend: str) -> Call:
    device = sets[0].accumulators[0].device
    scale = torch.full((), 0.5, dtype=torch.float64, device=device)
    norm = torch.full((), 2.0, dtype=torch.float64, device=device)

    def call(index: int) -> None:
        ops.finalise_(
            sets[index].gradients,
            sets[index].accumulators,
            scale,
            norm=norm,
            max_norm=_MAX_NORM,
            backend=backend,
        )

    return call


def ours_statistics(sets: TensorSets, backend: str) -> Call:
    statistics = ops.new_statistics(sets[0].gradients[0].device)
    return lambda index: ops.gradient_statistics_(
        sets[index].gradients, statistics, backend=backend
    )


def foreach_add(sets: TensorSets) -> Call:
    return lambda index: torch._foreach_add_(
        sets[index].accumulators, sets[index].gradients, alpha=SCALE
    )


def add_per_tensor(sets: TensorSets) -> Call:
    def call(index: int) -> None:
        pairs = zip(sets[index].accumulators, sets[index].gradients, strict=True)
        for accumulator, gradient in pairs:
            accumulator.add_(gradient, alpha=SCALE)

    return call


def add_flat(sets: TensorSets) -> Call:
    def call(index: int) -> None:
        accumulator, gradient = sets[index].flat
        accumulator.add_(gradient, alpha=SCALE)

    return call


def numpy_add(sets: TensorSets) -> Call:
    """``accumulator += scale * gradient`` in numpy, on one thread.

    numpy knows no bfloat16; such gradients are widened the usual way, by a shift of their bits.
    """
    lists = []
    for one in sets.sets:
        is_bfloat16 = one.gradients[0].dtype == torch.bfloat16
        gradients = [
            (tensor.view(torch.int16) if is_bfloat16 else tensor).numpy()
            for tensor in one.gradients
        ]
        lists.append(([tensor.numpy() for tensor in one.accumulators], gradients, is_bfloat16))

    def call(index: int) -> None:
        accumulators, gradients, is_bfloat16 = lists[index % len(lists)]
        for accumulator, gradient in zip(accumulators, gradients, strict=True):
            if is_bfloat16:
                bits = gradient.view(np.uint16).astype(np.uint32)
                bits <<= 16
                gradient = bits.view(np.float32)
            accumulator += np.float32(SCALE) * gradient

    return call


def foreach_zero_and_add(sets: TensorSets) -> Call:
    add = foreach_add(sets)

    def call(index: int) -> None:
        torch._foreach_zero_(sets[index].accumulators)
        add(index)

    return call


def foreach_mul_and_copy(sets: TensorSets) -> Call:
    """What one writes without a fused kernel; the accumulators change, by 1/2 and 2 in turn."""

    def call(index: int) -> None:
        # Each set meets the factors in turn, so that its values stay as large as they are.
        factor = 0.5 if (index // len(sets.sets)) % 2 == 0 else 2.0
        torch._foreach_mul_(sets[index].accumulators, factor)
        torch._foreach_copy_(sets[index].gradients, sets[index].accumulators)

    return call


def foreach_norm(sets: TensorSets) -> Call:
    """The norm of all gradients and whether it is finite, as ``clip_grad_norm_`` finds them."""

    def call(index: int) -> Tensor:
        norms = torch._foreach_norm(sets[index].gradients)
        finite: Tensor = torch.linalg.vector_norm(torch.stack(norms)).isfinite()
        return finite

    return call
