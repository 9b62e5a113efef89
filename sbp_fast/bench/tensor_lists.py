"""The tensors of the kernel cases: lists as a network has them, in as many sets as caches ask for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod

import torch
from torch import Tensor
from torch.nn import Parameter

from .shapes import Shape

# Sets are added until they hold this much together, several times the largest cache: what a call finds
# in the caches then is no more than training would find there.
_BYTES_BEYOND_CACHES = 512 << 20
_MOST_SETS = 4


@dataclass(frozen=True)
class TensorSet:
    """Accumulators and gradients of one network, each tensor with memory of its own.

    ``holders`` are parameters whose ``.grad`` these tensors are, where that is part of the case.
    """

    accumulators: list[Tensor]
    gradients: list[Tensor]
    holders: list[Parameter] = field(default_factory=list)

    @cached_property
    def flat(self) -> tuple[Tensor, Tensor]:
        """As many accumulators and gradients in one tensor each."""
        accumulators = torch.cat([tensor.flatten() for tensor in self.accumulators])
        return accumulators, torch.cat([tensor.flatten() for tensor in self.gradients])


@dataclass(frozen=True)
class TensorSets:
    """Sets to go round: call ``i`` takes set ``i`` modulo their number."""

    sets: Sequence[TensorSet]

    def __getitem__(self, call: int) -> TensorSet:
        return self.sets[call % len(self.sets)]

    @property
    def tensors(self) -> int:
        return len(self.sets[0].accumulators)

    @property
    def elements(self) -> int:
        return sum(tensor.numel() for tensor in self.sets[0].accumulators)


def make_set(
    shapes: Sequence[Shape],
    gradient_dtype: torch.dtype,
    device: torch.device,
    *,
    held_by_parameters: bool = False,
) -> TensorSet:
    """float32 accumulators and ``gradient_dtype`` gradients, all of normal random values."""
    accumulators = [torch.randn(shape, device=device) for shape in shapes]
    gradients = [torch.randn(shape, device=device).to(gradient_dtype) for shape in shapes]
    holders = []
    if held_by_parameters:
        for tensor in [*accumulators, *gradients]:
            holder = Parameter(torch.empty_like(tensor))
            holder.grad = tensor
            holders.append(holder)
    return TensorSet(accumulators, gradients, holders)


def make_sets(
    shapes: Sequence[Shape], gradient_dtype: torch.dtype, device: torch.device
) -> TensorSets:
    """As many sets as it takes to leave the caches behind."""
    elements = sum(prod(shape) for shape in shapes)
    bytes_per_set = elements * (torch.float32.itemsize + gradient_dtype.itemsize)
    number = min(max(_BYTES_BEYOND_CACHES // max(bytes_per_set, 1), 1), _MOST_SETS)
    return TensorSets([make_set(shapes, gradient_dtype, device) for _ in range(number)])
