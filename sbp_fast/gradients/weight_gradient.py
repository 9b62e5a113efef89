"""Layers whose weight gradient is added up by the matrix product that computes it.

The gradient of a linear layer's weight is one matrix product, ``dW = dY^T X``. Plain accumulation writes
it to memory and reads it again to add it; a product that adds to what is there (``beta=1`` of BLAS) does
without, and without the memory for it: the "gradient accumulation fusion" of Megatron-LM (Shoeybi et
al., arXiv 1909.08053). A convolution with a 1x1 kernel is such a layer at every pixel.

The functions here compute what ``torch.nn.functional`` computes, and differentiate like it: nothing is
added anywhere unless somebody gives a node of the graph a receiver.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

# Takes two matrices, (outputs, rows) and (rows, inputs), whose product is the gradient of a weight.
Receiver: TypeAlias = Callable[[Tensor, Tensor], None]

_linear, _convolution = functional.linear, {3: functional.conv1d, 4: functional.conv2d}


def add_product(
    total: Tensor, left: Tensor, right: Tensor, scale: float, *, first_write: bool
) -> None:
    """``total += scale * left @ right``, in place; with ``first_write``, ``total =`` that.

    Args:
        total: (outputs, inputs), in the precision of :func:`can_add`.
        left, right: (outputs, rows) and (rows, inputs).
    """
    beta = 0.0 if first_write else 1.0
    if left.dtype == total.dtype:
        total.addmm_(left, right, beta=beta, alpha=scale)
    else:
        _add_widened(total, left, right, beta, scale)


def can_add(device: torch.device, dtype: torch.dtype, total_dtype: torch.dtype) -> bool:
    """Whether products of matrices of ``dtype`` can be added to sums of ``total_dtype`` there."""
    if dtype == total_dtype:
        return True
    narrow = dtype in (torch.bfloat16, torch.float16) and total_dtype == torch.float32
    return narrow and device.type == "cuda" and widens_correctly(device, dtype)


def _add_widened(total: Tensor, left: Tensor, right: Tensor, beta: float, scale: float) -> None:
    torch.ops.aten.addmm.dtype_out(
        total, left, right, torch.float32, beta=beta, alpha=scale, out=total
    )


@functools.cache
def widens_correctly(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch adds products of 16-bit matrices to sums in float32: tried once for each kind.

    Some releases have no such product, some have one that rounds to 16 bits on the way.
    """
    generator = torch.Generator().manual_seed(0)
    left, right, before = (
        torch.randn(shape, generator=generator) for shape in ((48, 40), (40, 24), (48, 24))
    )
    left, right = left.to(dtype), right.to(dtype)
    scale = 0.25
    with torch.inference_mode(False), torch.no_grad():
        for beta in (0.0, 1.0):
            start = before if beta else torch.full_like(before, torch.nan)
            # As in a backward pass, where it is the other way round in memory.
            transposed = left.t().contiguous().t().to(device)
            total = start.to(device, copy=True)
            try:
                _add_widened(total, transposed, right.to(device), beta, scale)
            except (RuntimeError, NotImplementedError, AttributeError):
                return False
            expected = scale * (left.double() @ right.double())
            if beta:
                expected += before
            # Rounded to 16 bits, some of 1152 sums would be off by more than 2^-13 of the largest.
            error = (total.double().cpu() - expected).abs().max() / expected.abs().max()
            if not float(error) < 2.0**-16:
                return False
    return True


class _WithReceiver(torch.autograd.Function):
    """What the two functions have in common: a node that may be given a :data:`Receiver`."""

    @staticmethod
    def keep(ctx: Any, input: Tensor, weight: Tensor, dtype: torch.dtype) -> None:
        # The weight as it is, not as autocast casts it: that copy would live until backward.
        ctx.save_for_backward(input, weight)
        ctx.set_materialize_grads(False)
        ctx.dtype = dtype
        ctx.receive = None

    @staticmethod
    def take_receiver(ctx: Any) -> Receiver | None:
        """Not where the backward pass is itself to be differentiated: sums have no graph."""
        receive: Receiver | None = ctx.receive
        return receive if ctx.needs_input_grad[1] and not torch.is_grad_enabled() else None


class Linear(_WithReceiver):
    """``functional.linear``: input (..., inputs), weight (outputs, inputs), bias (outputs) or None.

    ``dtype``: in which it is computed; the input's own, and the weight is cast.
    """

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        _WithReceiver.keep(ctx, input, weight, dtype)
        ctx.bias_dtype = None if bias is None else bias.dtype
        # All in one dtype: autocast, where it is on, finds nothing left to cast.
        return _linear(input, weight.to(dtype), None if bias is None else bias.to(dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, ...]:
        if gradient is None:
            return None, None, None, None
        input, weight = ctx.saved_tensors
        rows = gradient.reshape(-1, gradient.shape[-1])
        of_input = of_weight = of_bias = None
        receive = _WithReceiver.take_receiver(ctx)
        if receive is not None:
            receive(rows.t(), input.reshape(-1, input.shape[-1]))
        elif ctx.needs_input_grad[1]:
            of_weight = rows.t() @ input.reshape(-1, input.shape[-1])
        if ctx.needs_input_grad[0]:
            of_input = (rows @ weight.to(ctx.dtype)).view(input.shape)
        if ctx.needs_input_grad[2]:
            of_bias = rows.sum(0, dtype=ctx.bias_dtype)
        return of_input, of_weight, of_bias, None


class PointwiseConvolution(_WithReceiver):
    """``functional.conv1d`` and ``conv2d`` with a kernel of one element, stride 1 and no padding.

    Input (samples, inputs, *pixels), weight (outputs, inputs, 1...), bias (outputs) or None; ``dtype`` as
    in :class:`Linear`.
    """

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        _WithReceiver.keep(ctx, input, weight, dtype)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return _convolution[input.dim()](
            input, weight.to(dtype), None if bias is None else bias.to(dtype)
        )

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, ...]:
        if gradient is None:
            return None, None, None, None
        input, weight = ctx.saved_tensors
        needs_input, needs_weight, needs_bias, _ = ctx.needs_input_grad
        receive = _WithReceiver.take_receiver(ctx)
        if receive is None:
            return (
                *_back(
                    input, weight.to(ctx.dtype), gradient, needs_input, needs_weight, needs_bias
                ),
                None,
            )
        receive(*_matrices(gradient, input))
        of_input = of_bias = None
        if needs_input:
            of_input, _, _ = _back(input, weight.to(ctx.dtype), gradient, True, False, False)
        if needs_bias:
            pixels = (0, *range(2, gradient.dim()))
            of_bias = gradient.sum(pixels, dtype=ctx.bias_dtype)
        return of_input, None, of_bias, None


def _matrices(gradient: Tensor, input: Tensor) -> tuple[Tensor, Tensor]:
    """Of a pointwise convolution, whose product goes over the pixels of all samples, so that the sum is
    read and written once. Where channels do not come last in memory that takes copies, which are small
    where the rule of :mod:`.fused` holds."""
    left, right = (tensor.movedim(1, -1).flatten(0, -2) for tensor in (gradient, input))
    return left.t(), right


def _back(input: Tensor, weight: Tensor, gradient: Tensor, *needed: bool) -> Any:
    ones, zeros = [1] * (input.dim() - 2), [0] * (input.dim() - 2)
    return torch.ops.aten.convolution_backward(
        *(gradient, input, weight, [len(weight)]),
        *(ones, zeros, ones, False, zeros, 1, needed),
    )
