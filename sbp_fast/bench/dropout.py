"""Dropout that knows its samples against torch's own, forward and back.

Torch's keeps a mask and multiplies with it on the way back; ours computes the mask again. Bytes are what
the task must move at least: each way reads and writes an activation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from ..invariance.dropout import PhiloxDropout
from .activations import Activation, describe, make_activation
from .case import Case, Contender
from .kernels import our_backends
from .timing import Call

TORCH = "torch dropout"
_PROBABILITY = 0.1


def cases(activations: Sequence[Activation], device: torch.device) -> list[Callable[[], Case]]:
    return [
        partial(_case, activation, dtype, device)
        for activation in activations
        for dtype in (torch.float32, torch.bfloat16)
    ]


def _case(activation: Activation, dtype: torch.dtype, device: torch.device) -> Case:
    x, gradient = (
        make_activation(activation, dtype, torch.contiguous_format, device) for _ in range(2)
    )
    x.requires_grad_()

    def torch_call(_: int) -> Tensor:
        return torch.autograd.grad(functional.dropout(x, _PROBABILITY), x, gradient)[0]

    def ours(backend: str) -> Call:
        mask = {"seed": 0, "call": 0, "first_sample": 0, "samples": len(x), "backend": backend}

        def call(_: int) -> Tensor:
            y = PhiloxDropout.apply(x, _PROBABILITY, mask)  # type: ignore[no-untyped-call]
            return torch.autograd.grad(y, x, gradient)[0]

        return call

    return Case(
        benchmark="dropout",
        name=f"forward and backward, {describe(x)}",
        dtype=dtype,
        tensors=1,
        elements=x.numel(),
        bytes=4 * x.numel() * x.itemsize,
        contenders=[
            *(
                Contender(f"sbp_fast {backend}", ours(backend), {TORCH: "time"})
                for backend in our_backends(device)
            ),
            Contender(TORCH, torch_call),
        ],
    )
