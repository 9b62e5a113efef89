"""One call of batch norm by all micro-batches: what it was given, what of it waits, and where graphs
begin anew behind it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from ..memory.host_store import Held


@dataclass
class Arguments:
    """What batch norm was called with, apart from the input."""

    layer: str
    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    momentum: float
    eps: float

    def is_tracked(self, input: Tensor) -> bool:
        return torch.is_grad_enabled() and any(
            tensor is not None and tensor.requires_grad
            for tensor in (input, self.weight, self.bias)
        )

    def edges(self, input: Tensor, *, first: bool) -> list[GradientEdge | None]:
        """Where gradients of the input, the weight and the bias go on to. The latter two are those of the
        whole large batch, and go through the first micro-batch."""
        tensors = (input, self.weight, self.bias) if first else (input, None, None)
        enabled = torch.is_grad_enabled()
        return [
            get_gradient_edge(tensor)
            if enabled and tensor is not None and tensor.requires_grad
            else None
            for tensor in tensors
        ]


@dataclass
class Visit:
    """One micro-batch's part in a call.

    ``mean``: by which a checkpoint that computes the call again finds it; None outside of checkpoints.
    """

    arguments: Arguments
    channels: int
    mean: Tensor | None
    input: Held | None
    edges: list[GradientEdge | None]
    is_tracked: bool
    gradient: Held | None = None

    def take_input(self) -> Tensor:
        assert self.input is not None
        return self.input.take().detach()

    def forget(self) -> None:
        self.edges, self.input, self.gradient = [], None, None


@dataclass
class Call:
    """One call of batch norm by all micro-batches, and what it is by the large batch's statistics."""

    arguments: Arguments
    visits: list[Visit]
    count: int
    mean: Tensor
    inv_std: Tensor
    coefficients: Tensor
    sums: Tensor | None = None
    backward: Tensor | None = None


class BeginGraph(torch.autograd.Function):
    """A tensor with a graph that begins at it, and which in-place operations may change."""

    @staticmethod
    def forward(ctx: Any, origin: Tensor, compute: Callable[[], Tensor]) -> Tensor:
        return compute()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        return None, None
