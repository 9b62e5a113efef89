"""The backward pass of a graph that is cut in several places, each of its nodes run exactly once.

A micro-batch's graph is cut at every batch norm call: between the call's input and its output there is
no edge, because the gradient must wait there for the other micro-batches. Going back from cut to cut
with one ``backward`` each would run what lies before several cuts (the trunk under skip connections)
several times over. So every node belongs to a level: the first cut that its output reaches. Levels run
from the last to the first; a gradient that arrives at a node of an earlier level waits until that
level's turn, when all that it is to be added to has arrived.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

Edge = tuple[Node, int]
Take = Callable[[], Tensor]

_ACCUMULATE_GRAD = type(get_gradient_edge(torch.zeros((), requires_grad=True)).node)


class CutGraph:
    """The graph of one micro-batch, known cut by cut as forward comes along.

    Args:
        keep: takes a gradient that must wait, returns what gives it back.
        deliver: ``deliver(leaf, gradient)``: where gradients of leaves go.
    """

    def __init__(
        self, keep: Callable[[Tensor], Take], deliver: Callable[[Tensor, Tensor], None]
    ) -> None:
        self._keep = keep
        self._deliver = deliver
        self._level_of: dict[Node, int] = {}
        self._cuts: dict[Node, int] = {}
        # Per level: the edges on which its nodes hand gradients on to leaves, cuts and earlier levels.
        self._exits: list[list[Edge]] = []
        # Where gradients can arrive from outside, and those that have: per level and edge, per cut.
        self._entries: dict[Node, int] = {}
        self._arrived: dict[int, dict[Edge, Take]] = {}
        self._at_cuts: dict[int, Take] = {}
        self._guarded: set[Node] = set()
        self._running = _Running()

    def end_level(self, roots: Iterable[GradientEdge]) -> None:
        """Gives a level, the next one, to all nodes before ``roots`` that have none yet."""
        level = len(self._exits)
        exits: dict[Edge, None] = {}
        to_visit = []
        for root in roots:
            if self._claim(root.node, level):
                to_visit.append(root.node)
            if root.node in self._level_of:
                self._entries[root.node] = self._level_of[root.node]
        while to_visit:
            for node, position in to_visit.pop().next_functions:
                if node is None:
                    continue
                if self._claim(node, level):
                    to_visit.append(node)
                elif self._level_of.get(node) != level:
                    exits[node, position] = None
        self._exits.append(list(exits))
        for node, _ in exits:
            if node in self._level_of and node not in self._guarded:
                self._guarded.add(node)
                self._entries[node] = self._level_of[node]
                self._running.stop_before(node, self._level_of[node])

    def _claim(self, node: Node, level: int) -> bool:
        if node in self._level_of or node in self._cuts or type(node) is _ACCUMULATE_GRAD:
            return False
        if type(node).__name__ == "CheckpointFunctionBackward":
            raise RuntimeError(
                "a reentrant checkpoint computes its gradients in one go, and cannot wait for the other "
                "micro-batches at batch norm; pass use_reentrant=False to torch.utils.checkpoint "
                "(gradient_checkpointing_kwargs in Transformers), or batch_norm='micro_batch'"
            )
        self._level_of[node] = level
        return True

    def begin_after_cut(self, output: Tensor, cut: int) -> None:
        """``output``, just computed, is where the graph goes on after this cut."""
        self._cuts[_node_of(output)] = cut

    def nodes(self) -> list[Node]:
        """All nodes, while forward is not over."""
        return list(self._level_of)

    def close(self) -> None:
        """Forward is over. Forgets the nodes that only forward had to know, so that they can go."""
        self._level_of.clear()
        self._guarded.clear()

    def run(self, level: int, roots: Sequence[tuple[GradientEdge, Tensor]]) -> None:
        """Adds ``roots``, edges with gradients, and runs one level; all later ones must have run."""
        edges, gradients = [], []
        for edge, gradient in roots:
            if self._entries.get(edge.node) == level:
                edges.append(edge)
                gradients.append(gradient)
            else:
                self._send((edge.node, edge.output_nr), gradient)
        for (node, position), take in self._arrived.pop(level, {}).items():
            edges.append(GradientEdge(node, position))
            gradients.append(take())
        exits, self._exits[level] = self._exits[level], []
        # Whoever holds a node holds what it has saved.
        self._entries = {node: at for node, at in self._entries.items() if at != level}
        if not edges or not exits:
            return
        with self._running.at(level):
            results = torch.autograd.grad(
                edges,
                [GradientEdge(*edge) for edge in exits],
                gradients,
                # The engine frees what it visits: also what is before an exit, on a path to another.
                retain_graph=_are_nested(exits),
                allow_unused=True,
            )
        for exit, result in zip(exits, results, strict=True):
            if result is not None:
                self._send(exit, result)

    def _send(self, edge: Edge, gradient: Tensor) -> None:
        node = edge[0]
        if type(node) is _ACCUMULATE_GRAD:
            leaf: Tensor = node.variable  # type: ignore[attr-defined]
            self._deliver(leaf, gradient)
            return
        cut = self._cuts.get(node)
        if cut is not None:
            before = self._at_cuts.get(cut)
            self._at_cuts[cut] = self._keep(gradient if before is None else before() + gradient)
            return
        arrived = self._arrived.setdefault(self._entries[node], {})
        before = arrived.get(edge)
        arrived[edge] = self._keep(gradient if before is None else before() + gradient)

    def take_gradient(self, cut: int) -> Tensor | None:
        """The gradient of a cut's output, once all levels after the cut have run."""
        take = self._at_cuts.pop(cut, None)
        return None if take is None else take()


def _are_nested(exits: Sequence[Edge]) -> bool:
    """Whether a path leads from one of these nodes to another."""
    ends = {node for node, _ in exits}
    to_visit = list(ends) if len(ends) > 1 else []
    visited = set(ends)
    while to_visit:
        for node, _ in to_visit.pop().next_functions:
            if node in ends:
                return True
            if node is not None and node not in visited:
                visited.add(node)
                to_visit.append(node)
    return False


class _Running:
    """The level that runs. The engine stops at the exits it is asked for, unless a path leads on to
    another exit: then it goes on, with no gradient, since that comes at the level's own turn."""

    _NOTHING = -1

    def __init__(self) -> None:
        self._level = self._NOTHING

    @contextmanager
    def at(self, level: int) -> Iterator[None]:
        """Only then, since micro-batches may have nodes in common: a weight that autocast cast once."""
        self._level = level
        try:
            yield
        finally:
            self._level = self._NOTHING

    def stop_before(self, node: Node, level: int) -> None:
        def keep_out(gradients: tuple[Tensor, ...]) -> tuple[None, ...] | None:
            return tuple(None for _ in gradients) if self._level > level else None

        node.register_prehook(keep_out)


def _node_of(output: Tensor) -> Node:
    assert output.grad_fn is not None
    return output.grad_fn
