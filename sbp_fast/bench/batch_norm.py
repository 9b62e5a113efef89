"""Batch norm's passes against torch's batch norm, which computes a micro-batch by itself.

Ours come in two parts on either way, so that all micro-batches can meet between them: statistics and
normalise; the backward sums and apply. On CUDA torch has the same parts, for batch norm over processes;
on the CPU both parts are one function. Bytes are those of the parts: an activation is read by each of
them and written by the second, and on the way back its gradient likewise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from .. import ops
from .activations import LAYOUTS, Activation, describe, make_activation
from .case import Case, Contender
from .kernels import our_backends
from .timing import Call

TORCH = "torch batch norm"
_EPS = 1e-5


def cases(activations: Sequence[Activation], device: torch.device) -> list[Callable[[], Case]]:
    """Forward and backward of each activation, in float32 and bfloat16 and both memory formats."""
    return [
        partial(make, activation, dtype, layout, device)
        for make in (_forward, _backward)
        for activation in activations
        for dtype in (torch.float32, torch.bfloat16)
        for layout in LAYOUTS
    ]


def _forward(
    activation: Activation, dtype: torch.dtype, layout: torch.memory_format, device: torch.device
) -> Case:
    x = make_activation(activation, dtype, layout, device)
    weight = torch.ones(x.shape[1], device=device)

    def ours(backend: str) -> Call:
        def call(_: int) -> Tensor:
            mean, squares = ops.batch_norm_statistics(x, backend=backend)
            inverse = (squares / (x.numel() / x.shape[1]) + _EPS).rsqrt()
            coefficients = torch.stack((mean, inverse * weight, torch.zeros_like(mean)))
            return ops.batch_norm_normalise(x, coefficients, backend=backend)

        return call

    return _case("forward", x, 3, ours, _torch_forward(x, weight))


def _backward(
    activation: Activation, dtype: torch.dtype, layout: torch.memory_format, device: torch.device
) -> Case:
    x, dy = (make_activation(activation, dtype, layout, device) for _ in range(2))
    weight = torch.ones(x.shape[1], device=device)
    mean = torch.zeros(x.shape[1], dtype=torch.float64, device=device)
    inverse = torch.ones_like(mean)
    count = x.numel() / x.shape[1]

    def ours(backend: str) -> Call:
        def call(_: int) -> Tensor:
            of_xhat = torch.stack((mean, inverse))
            sums = ops.batch_norm_backward_statistics(dy, x, of_xhat, backend=backend)
            factor = inverse * weight
            a, b, c = factor, -factor * inverse * sums[1] / count, -factor * sums[0] / count
            coefficients = torch.stack((mean, a, b, c))
            return ops.batch_norm_backward_apply(dy, x, coefficients, backend=backend)

        return call

    return _case("backward", x, 5, ours, _torch_backward(dy, x, weight))


def _case(
    way: str, x: Tensor, accesses: int, ours: Callable[[str], Call], torch_call: Call
) -> Case:
    return Case(
        benchmark="batch norm",
        name=f"{way}, {describe(x)}",
        dtype=x.dtype,
        tensors=1,
        elements=x.numel(),
        bytes=accesses * x.numel() * x.itemsize,
        contenders=[
            *(
                Contender(f"sbp_fast {backend}", ours(backend), {TORCH: "speedup"})
                for backend in our_backends(x.device)
            ),
            Contender(TORCH, torch_call),
        ],
    )


def _torch_forward(x: Tensor, weight: Tensor) -> Call:
    zeros = torch.zeros_like(weight)
    if x.device.type == "cuda":

        def in_parts(_: int) -> Tensor:
            mean, inverse = torch.batch_norm_stats(x, _EPS)
            return torch.batch_norm_elemt(x, weight, zeros, mean, inverse, _EPS)

        return in_parts
    return lambda _: torch.native_batch_norm(x, weight, zeros, None, None, True, 0.1, _EPS)[0]


def _torch_backward(dy: Tensor, x: Tensor, weight: Tensor) -> Call:
    mean, inverse = torch.zeros_like(weight), torch.ones_like(weight)
    if x.device.type == "cuda":
        count = torch.tensor([x.numel() // x.shape[1]], dtype=torch.int32, device=x.device)

        def in_parts(_: int) -> Tensor:
            sum_dy, sum_dy_xmu = torch.batch_norm_backward_reduce(
                dy, x, mean, inverse, weight, True, True, True
            )[:2]
            return torch.batch_norm_backward_elemt(
                dy, x, mean, inverse, weight, sum_dy, sum_dy_xmu, count
            )

        return in_parts
    return lambda _: torch.ops.aten.native_batch_norm_backward(
        dy, x, weight, None, None, mean, inverse, True, _EPS, [True, True, True]
    )[0]
