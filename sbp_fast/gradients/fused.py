"""Weight gradients that go straight into the accumulators: for which layers, and from which graphs.

While a step runs, calls of large layers go through functions of ours (:mod:`.weight_gradient`), which
compute the same. When the backward pass is about to begin, its graph is read, and those of their nodes
that are all there is to the gradient of a weight are told to add it to the accumulator. A gradient that
comes from several nodes (tied weights, a layer that is called twice) is left to autograd, which adds up
the parts first: an accumulator must never hold a part of a micro-batch's gradient, since memory may run
out before the rest comes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

from .accumulators import accumulator_dtype
from .calls import taking
from .hooks import GradientHooks
from .weight_gradient import Linear, PointwiseConvolution, can_add

# Smaller weights cost less to write and to read again than a call of ours costs in Python.
_LEAST_BYTES = 2 << 20

_OURS = (Linear._backward_cls, PointwiseConvolution._backward_cls)
_ACCUMULATE_GRAD = type(get_gradient_edge(torch.zeros((), requires_grad=True)).node)


class Sums(Protocol):
    """Where gradients are added up, by the position of their parameter."""

    def add_product(self, position: int, left: Tensor, right: Tensor) -> None: ...


class FusedGradients:
    """The layers of a step whose weight gradients may be added by their matrix products.

    Args:
        hooks: has the parameters, and knows who else waits for their gradients.
    """

    def __init__(self, hooks: GradientHooks) -> None:
        self._hooks = hooks
        self._weights = {
            id(parameter): (position, parameter)
            for position, parameter in enumerate(hooks.parameters)
            if _is_large_matrix(parameter)
        }
        # Since the last graph was read.
        self._called = False

    @contextmanager
    def during(self) -> Iterator[None]:
        """While inside, calls with large weights are computed by functions of ours."""
        with taking(dict.fromkeys(self._weights, self)):
            yield

    def from_roots(self, roots: Iterable[Tensor], sums: Sums) -> None:
        """Of the graph of one micro-batch: gradients that come from one node alone go to ``sums``."""
        if not self._called:
            return
        self._called = False
        ours: list[Node] = []
        gradients: dict[Node, int] = {}
        to_visit = [root.grad_fn for root in roots if root.grad_fn is not None]
        seen = set(to_visit)
        while to_visit:
            node = to_visit.pop()
            if isinstance(node, _OURS):
                ours.append(node)
            for following, _ in node.next_functions:
                if type(following) is _ACCUMULATE_GRAD:
                    gradients[following] = gradients.get(following, 0) + 1
                elif following is not None and following not in seen:
                    seen.add(following)
                    to_visit.append(following)
        self._give((node for node in ours if gradients.get(_gradient_of_weight(node)) == 1), sums)

    def from_nodes(self, nodes: Iterable[Node], sums: Sums) -> None:
        """Of graphs whose step begins anew where memory runs out: every gradient that comes from a node
        of ours goes to ``sums``."""
        if self._weights:
            self._give((node for node in nodes if isinstance(node, _OURS)), sums)

    def _give(self, nodes: Iterable[Node], sums: Sums) -> None:
        for node in nodes:
            weight = _gradient_of_weight(node).variable  # type: ignore[attr-defined]
            known = self._weights.get(id(weight))
            if known is not None and self._hooks.has_no_other_hook(known[0]):
                receive = partial(sums.add_product, known[0])
                node.receive = receive  # type: ignore[attr-defined]

    # What calls are offered to

    def linear(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        """``functional.linear``, or None: left to torch."""
        if weight.dim() != 2 or input.dim() < 2 or input.shape[-1] != weight.shape[1]:
            return None
        return self._apply(Linear.apply, input, weight, bias)

    def pointwise(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        """``functional.conv1d`` or ``conv2d`` with a kernel of one element, or None: left to torch."""
        outputs, inputs, *kernel = weight.shape
        if input.dim() != weight.dim() or len(kernel) not in (1, 2) or input.shape[1] != inputs:
            return None
        # With more pixels the product itself takes the time, and torch's is then the faster one.
        pixels = input.numel() // inputs
        if 2 * pixels > min(outputs, inputs):
            return None
        return self._apply(PointwiseConvolution.apply, input, weight, bias)

    def _apply(
        self, function: Callable[..., Any], input: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor | None:
        if not (weight.requires_grad and weight.is_leaf) or input.numel() == 0:
            return None
        if bias is not None and (bias.dtype != weight.dtype or bias.shape != weight.shape[:1]):
            return None
        dtype = weight.dtype
        device = input.device
        if torch.is_autocast_enabled(device.type):
            if torch.float64 in (input.dtype, weight.dtype) or not input.is_floating_point():
                return None
            dtype = torch.get_autocast_dtype(device.type)
        elif input.dtype != dtype:
            return None
        if not can_add(device, dtype, accumulator_dtype(weight.dtype)):
            return None
        self._called = True
        output: Tensor = function(input.to(dtype), weight, bias, dtype)
        return output


def _is_large_matrix(parameter: Tensor) -> bool:
    return (
        parameter.dim() in (2, 3, 4)
        and all(size == 1 for size in parameter.shape[2:])
        and parameter.nbytes >= _LEAST_BYTES
    )


def _gradient_of_weight(node: Node) -> Node:
    """The node that takes the gradient of the weight, the second argument of our functions."""
    following = node.next_functions[1][0]
    assert following is not None
    return following
