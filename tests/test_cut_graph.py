"""Backward through a graph that is cut: the right gradients, and every node once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from sbp_fast.invariance.cut_graph import CutGraph

Cut = Callable[[Tensor], Tensor]


class Visited(torch.autograd.Function):
    """The identity; counts how often a gradient comes by."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str, counts: Counter[str]) -> Tensor:
        ctx.name, ctx.counts = name, counts
        ctx.set_materialize_grads(False)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, None, None]:
        if gradient is not None:
            ctx.counts[ctx.name] += 1
        return gradient, None, None


class Begin(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, origin: Tensor, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        raise AssertionError("the graph ends at a cut")


class Case:
    def __init__(self) -> None:
        torch.manual_seed(0)
        self.counts: Counter[str] = Counter()
        self.w = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
        self.v = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
        self.x = torch.randn(3, 4, dtype=torch.float64)

    def seen(self, x: Tensor, name: str) -> Tensor:
        return Visited.apply(x, name, self.counts)

    def chain(self, cut: Cut) -> Tensor:
        return torch.tanh(cut(torch.tanh(cut(self.x @ self.w)) @ self.v)).sum()

    def residual(self, cut: Cut) -> Tensor:
        """Each trunk tensor reaches a later cut and, past it, all that comes after."""
        trunk = self.x @ self.w
        for block in range(5):
            trunk = self.seen(torch.tanh(trunk), f"trunk {block}")
            trunk = trunk + cut(torch.sin(cut(trunk @ self.v)) @ self.w)
        return trunk.square().sum()

    def nested(self, cut: Cut) -> Tensor:
        """A level ends at a node and, on another path, at one before it; weights are shared."""
        y = cut(self.seen(self.x @ self.w, "input"))
        a = self.seen(torch.sin(y), "a")
        d = cut(a @ self.w)
        c = (torch.exp(a) * torch.tanh(y) * torch.cos(a @ self.w)) @ self.v
        return (d * c).sum() + (a @ self.w).sum()

    def branches(self, cut: Cut) -> Tensor:
        h = self.x @ self.w
        return (cut(h) * cut(h @ self.v) + cut(torch.exp(h)) + h).square().sum()

    def one_after_the_other(self, cut: Cut) -> Tensor:
        return (cut(cut(self.x @ self.w)) @ self.v).square().sum()

    def of_a_parameter(self, cut: Cut) -> Tensor:
        return (cut(self.w) @ cut(self.v)).square().sum()

    def unused(self, cut: Cut) -> Tensor:
        cut(self.x @ self.v)
        return (cut(self.x @ self.w)).square().sum()

    def pyramid(self, cut: Cut) -> Tensor:
        """Early features are used again much later, without a cut in between."""
        features = []
        h = self.x @ self.w
        for level in range(4):
            h = self.seen(torch.tanh(cut(h @ self.v)), f"feature {level}")
            features.append(h)
        total = features[-1]
        for feature in features[-2::-1]:
            total = total * 0.5 + feature * torch.cos(total)
        return (total @ self.w).square().sum()


NAMES = [
    "chain",
    "residual",
    "nested",
    "branches",
    "one_after_the_other",
    "of_a_parameter",
    "unused",
    "pyramid",
]


def run(function: Callable[[Cut], Tensor]) -> dict[int, Tensor]:
    """The gradients of a cut graph, where each cut's input gets its output's gradient twice over."""
    gradients: dict[int, Tensor] = {}

    def deliver(leaf: Tensor, gradient: Tensor) -> None:
        gradients[id(leaf)] = gradients.get(id(leaf), 0) + gradient  # type: ignore[operator]

    graph = CutGraph(lambda gradient: lambda: gradient, deliver)
    origin = torch.empty(0, requires_grad=True)
    edges = []

    def cut(x: Tensor) -> Tensor:
        edges.append(get_gradient_edge(x))
        graph.end_level([edges[-1]])
        output = Begin.apply(origin, x.detach())
        graph.begin_after_cut(output, len(edges) - 1)
        return output

    loss = function(cut)
    graph.end_level([get_gradient_edge(loss)])
    graph.close()
    graph.run(len(edges), [(get_gradient_edge(loss), torch.ones_like(loss))])
    for level in reversed(range(len(edges))):
        gradient = graph.take_gradient(level)
        graph.run(level, [] if gradient is None else [(edges[level], 2.0 * gradient)])
    return gradients


class Twice(torch.autograd.Function):
    """What a cut amounts to here."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2.0 * gradient


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_the_whole_graph(name: str) -> None:
    case = Case()
    found = run(getattr(case, name))
    leaves = [case.w, case.v]
    expected = torch.autograd.grad(getattr(case, name)(Twice.apply), leaves, allow_unused=True)
    for leaf, gradient in zip(leaves, expected, strict=True):
        if gradient is None:
            assert id(leaf) not in found
        else:
            torch.testing.assert_close(found[id(leaf)], gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_every_node_sees_one_gradient(name: str) -> None:
    case = Case()
    run(getattr(case, name))
    assert set(case.counts.values()) <= {1}


def test_a_level_frees_what_it_has_run() -> None:
    case = Case()

    class Saved:
        alive = 0

        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor
            Saved.alive += 1

        def __del__(self) -> None:
            Saved.alive -= 1

    graph = CutGraph(lambda gradient: lambda: gradient, lambda leaf, gradient: None)
    origin = torch.empty(0, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        x = torch.tanh(case.x @ case.w)
        graph.end_level([get_gradient_edge(x)])
        edges = [get_gradient_edge(x)]
        y = Begin.apply(origin, x.detach())
        graph.begin_after_cut(y, 0)
        before = Saved.alive
        loss = torch.exp(torch.sin(y)).sum()
    assert Saved.alive > before > 0
    graph.end_level([get_gradient_edge(loss)])
    graph.close()
    root = get_gradient_edge(loss)
    ones = torch.ones_like(loss)
    del loss, y, x
    graph.run(1, [(root, ones)])
    del root
    assert Saved.alive == before
    gradient = graph.take_gradient(0)
    assert gradient is not None
    graph.run(0, [(edges.pop(), gradient)])
    assert Saved.alive == 0
