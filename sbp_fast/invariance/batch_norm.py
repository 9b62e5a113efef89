"""Batch norm over the whole large batch, in unmodified models.

Each micro-batch runs until it calls batch norm in training mode, hands over the moments of its input,
and goes on when those of the whole large batch are known. There its graph is cut: the output has no
edge to the input. In the backward pass, when all micro-batches have the gradient of a call's output,
two sums over the large batch give the gradients of its weight, its bias and each of its inputs
(:mod:`.statistics`). Statistics held fixed would not do: they would lose the gradient that flows
through mean and variance.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge, saved_tensors_hooks

from .. import ops
from ..memory.host_store import Held, HostStore
from . import statistics
from .batch_norm_calls import Arguments, BeginGraph, Call, Visit
from .batch_norm_layers import Layers
from .cut_graph import CutGraph
from .intercept import answering, native
from .lockstep import Lockstep, Member, in_both_directions
from .statistics import Moments

Roots = Sequence[tuple[Tensor, Tensor]]


class ExactBatchNorm:
    """One large batch's way forward and back through a model with batch norm.

    Args:
        modules: by whose names errors call layers.
        lockstep: runs the micro-batches.
        store: where what waits is kept.
        deliver: ``deliver(leaf, gradient)`` receives the gradients of parameters.
        backend: of the kernels.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        lockstep: Lockstep[Any],
        store: HostStore,
        deliver: Callable[[Tensor, Tensor], None],
        backend: str,
    ) -> None:
        self.thread = threading.get_ident()
        self._in_backward = False
        self._lockstep = lockstep
        self._store = store
        self._deliver = deliver
        self._backend = backend
        self._layers = Layers(modules)
        self._calls: list[Call] = []
        self._graphs: list[CutGraph] = []
        self._rounds = 0
        # What a cut's output depends on in the eyes of autograd, so that its graph begins there.
        self._origin = torch.empty(0, requires_grad=True)

    # Forward

    def forward(self, runs: Iterable[Callable[[], Any]]) -> list[Any]:
        """Runs all micro-batches to their end; returns their results, in order.

        Raises:
            RuntimeError: they call batch norm in different order, or where they cannot wait.
            ValueError: a channel has one value in the whole large batch.
        """
        members = self._lockstep.members
        # Not a method of this object: autograd keeps the hooks with what it saves, where no garbage
        # collector sees that they lead back to the graph.
        with answering(self), saved_tensors_hooks(self._store.hold, Held.take):
            try:
                for run in runs:
                    self._graphs.append(CutGraph(partial(_keep, self._store), self._deliver))
                    self._lockstep.start(run)
                while not self._all_have_finished():
                    self._close_call()
                    for member in self._round():
                        self._lockstep.resume(member)
            except BaseException:
                self._lockstep.abandon()
                raise
        return [member.result for member in members]

    def batch_norm(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        """What ``torch.nn.functional.batch_norm`` is to the micro-batch that runs."""
        if not training:
            output: Tensor = native("batch_norm")(
                input, running_mean, running_var, weight, bias, training, momentum, eps
            )
            return output
        arguments = Arguments(
            self._layers.name_of(running_mean, weight),
            *(running_mean, running_var, weight, bias, momentum, eps),
        )
        if input.dim() < 2:
            raise ValueError(
                f"batch norm {arguments.layer} was given a tensor of shape {tuple(input.shape)}; it must "
                "have at least two dimensions, (samples, channels, ...)"
            )
        values = ops.batch_norm_statistics(input.detach(), backend=self._backend)
        moments = Moments(input.numel() // input.shape[1], values[0], values[1])
        if self._in_backward:
            return self._recompute(input, arguments, moments)
        member = self._running()
        edges = arguments.edges(input, first=member.position == 0)
        visit = Visit(
            arguments,
            len(moments.mean),
            moments.mean.clone() if self._may_come_again() else None,
            self._store.hold(input),
            edges,
            arguments.is_tracked(input),
        )
        self._layers.note_count(running_mean)
        self._graphs[member.position].end_level([edge for edge in edges if edge is not None])
        del edges
        # The moments are not part of the visit, which stays: for every micro-batch they have as many
        # elements as the model has channels.
        self._lockstep.meet((visit, moments), f"batch norm {arguments.layer}")
        call = self._calls[-1]
        output = self._output(visit.take_input(), call.coefficients, visit.is_tracked)
        if visit.is_tracked:
            self._graphs[member.position].begin_after_cut(output, len(self._calls) - 1)
        # A variable of the model's may keep it over further calls although autograd does not (a residual
        # block's shortcut, which is only added): then it waits with the rest, for as long as it lives.
        output._held = self._store.hold(output)  # type: ignore[attr-defined]
        return output

    def _all_have_finished(self) -> bool:
        members = self._lockstep.members
        finished = [member for member in members if member.finished]
        if finished and len(finished) < len(members):
            waiting = next(member for member in members if not member.finished)
            raise RuntimeError(
                f"micro-batch {waiting.position} waits in batch norm "
                f"{waiting.message[0].arguments.layer}, but micro-batch {finished[0].position} has ended "
                f"after {len(self._calls)} calls of batch norm; with batch_norm='exact' all "
                "micro-batches must make the same calls in the same order, whatever their data: "
                "take the branch out of the model, or pass batch_norm='micro_batch'"
            )
        return len(finished) == len(members)

    def _close_call(self) -> None:
        """All have arrived: computes what each needs to go on, and updates the running statistics."""
        visits: list[Visit] = [member.message[0] for member in self._lockstep.members]
        for position, visit in enumerate(visits):
            self._check_same_call(visits[0], visit, position)
        whole = statistics.merge([member.message[1] for member in self._lockstep.members])
        arguments = visits[0].arguments
        if whole.count <= 1:
            raise ValueError(
                f"batch norm {arguments.layer} has {whole.count} value per channel in the whole large "
                "batch; it needs at least 2 to have a variance: use a larger batch, or .eval() on that "
                "layer"
            )
        inv_std = statistics.inverse_deviation(whole, arguments.eps)
        self._calls.append(
            Call(
                arguments,
                visits,
                whole.count,
                whole.mean,
                inv_std,
                statistics.forward_coefficients(
                    whole.mean, inv_std, arguments.weight, arguments.bias
                ),
            )
        )
        # With momentum=None the factor is one over the number of batches, the first arrival's.
        momentum = max(visit.arguments.momentum for visit in visits)
        with torch.no_grad():
            news = statistics.running_statistics(whole)
            for running, new in zip(
                (arguments.running_mean, arguments.running_var), news, strict=True
            ):
                if running is not None:
                    running.mul_(1.0 - momentum).add_(new.to(running.dtype), alpha=momentum)
        self._layers.count_once()

    def _check_same_call(self, first: Visit, visit: Visit, position: int) -> None:
        expected = (first.arguments.layer, first.arguments.eps, first.channels)
        found = (visit.arguments.layer, visit.arguments.eps, visit.channels)
        if expected != found:
            raise RuntimeError(
                f"call {len(self._calls)} of batch norm is {visit.arguments.layer} "
                f"({visit.channels} channels) in micro-batch {position} but "
                f"{first.arguments.layer} ({first.channels} channels) in micro-batch 0; with "
                "batch_norm='exact' all micro-batches must make the same calls in the same order, "
                "whatever their data: take the branch out of the model, or pass "
                "batch_norm='micro_batch'"
            )

    def _output(self, input: Tensor, coefficients: Tensor, is_tracked: bool) -> Tensor:
        def normalise() -> Tensor:
            return ops.batch_norm_normalise(input, coefficients, backend=self._backend)

        if not is_tracked:
            return normalise()
        output: Tensor = BeginGraph.apply(self._origin, normalise)  # type: ignore[no-untyped-call]
        return output

    # Backward

    def backward(self, roots: Sequence[Roots], prepare: Callable[[Iterable[Node]], None]) -> None:
        """Runs every micro-batch back from its ``roots``: tensors, and the gradient of each.

        Args:
            prepare: is given the nodes of each micro-batch's graph before any of them runs.
        """
        members = self._lockstep.members
        starts = []
        for graph, pairs in zip(self._graphs, roots, strict=True):
            starts.append([(get_gradient_edge(tensor), gradient) for tensor, gradient in pairs])
            graph.end_level([edge for edge, _ in starts[-1]])
            prepare(graph.nodes())
            graph.close()
        del roots, pairs
        for member in members:
            member.result = None
        self._in_backward = True
        with answering(self), self._layers.counts_kept():
            for level in range(len(self._calls), -1, -1):
                self._run_level(level, starts)
        # They lead back here, in a cycle that would keep what they hold beyond the step.
        self._graphs.clear()

    def _run_level(self, level: int, starts: list[list[tuple[GradientEdge, Tensor]]]) -> None:
        """Back from a call, or the very end, to all earlier calls; sums what the next one needs."""
        after = self._calls[level] if level < len(self._calls) else None
        before = self._calls[level - 1] if level > 0 else None
        sums: dict[int, Tensor] = {}
        for member in self._round():
            position = member.position
            with self._lockstep.turn(member):
                if after is None:
                    edges, starts[position] = starts[position], []
                else:
                    edges = self._gradients_of_arguments(after, position)
                self._graphs[position].run(level, edges)
                del edges
                if before is not None:
                    gradient = self._graphs[position].take_gradient(level - 1)
                    if gradient is not None:
                        sums[position] = self._sum(before, before.visits[position], gradient)
                        del gradient
        if before is not None and sums:
            before.sums = torch.stack([sums[position] for position in sorted(sums)]).sum(0)
            before.backward = statistics.backward_coefficients(
                before.count, before.mean, before.inv_std, before.arguments.weight, before.sums
            )

    def _sum(self, call: Call, visit: Visit, gradient: Tensor) -> Tensor:
        visit.gradient = self._store.hold(gradient)
        return ops.batch_norm_backward_statistics(
            gradient,
            visit.take_input(),
            torch.stack([call.mean, call.inv_std]),
            backend=self._backend,
        )

    def _gradients_of_arguments(
        self, call: Call, position: int
    ) -> list[tuple[GradientEdge, Tensor]]:
        """Of one micro-batch's input; of the weight and the bias, which are all one, in the first."""
        visit = call.visits[position]
        sums = call.sums
        gradients: list[tuple[GradientEdge, Tensor]] = []
        if sums is None or call.backward is None:
            visit.forget()
            return gradients
        of_input, of_weight, of_bias = visit.edges
        if of_input is not None:
            input = visit.take_input()
            # One whose output nobody used still gets what flows through the mean and the variance.
            gradient = torch.zeros_like(input) if visit.gradient is None else visit.gradient.take()
            of_whole = ops.batch_norm_backward_apply(
                gradient, input, call.backward, backend=self._backend
            )
            gradients.append((of_input, of_whole))
        if position == 0:
            for edge, tensor, total in (
                (of_weight, call.arguments.weight, sums[1]),
                (of_bias, call.arguments.bias, sums[0]),
            ):
                if edge is not None and tensor is not None:
                    gradients.append((edge, total.to(tensor.dtype)))
        visit.forget()
        return gradients

    def _recompute(self, input: Tensor, arguments: Arguments, moments: Moments) -> Tensor:
        """A checkpoint computes its part of the model again: the statistics are known by now."""
        member = self._running()
        calls = [call for call in self._calls if call.arguments.layer == arguments.layer]
        if not calls:
            raise RuntimeError(
                f"batch norm {arguments.layer} is called in the backward pass but was not in the forward "
                "pass; with batch_norm='exact' a checkpoint must compute the same twice"
            )
        # A layer that is called several times: the call whose input was this one.
        call = min(
            calls,
            key=lambda call: _distance(call.visits[member.position].mean, moments.mean),
        )
        visit = call.visits[member.position]
        needs_graph = torch.is_grad_enabled() and (input.requires_grad or visit.is_tracked)
        if needs_graph and not visit.is_tracked:
            raise RuntimeError(
                f"batch norm {arguments.layer} is inside a reentrant checkpoint, where the backward pass "
                "cannot wait for the other micro-batches; pass use_reentrant=False to "
                "torch.utils.checkpoint, or batch_norm='micro_batch'"
            )
        return self._output(input.detach(), call.coefficients, needs_graph)

    # Both ways

    @property
    def answers(self) -> Mapping[str, Callable[..., Any]]:
        # Not an attribute: it would keep this object, and so the large batch, in a cycle.
        return {"batch_norm": self.batch_norm}

    def is_computing(self, in_autograd: bool) -> bool:
        return self._lockstep.current is not None and (self._in_backward or not in_autograd)

    def _running(self) -> Member[Any]:
        member = self._lockstep.current
        assert member is not None
        return member

    def _may_come_again(self) -> bool:
        """Inside of a checkpoint, whose own hooks on saved tensors are above ours."""
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
        return hooks is None or hooks[0] != self._store.hold

    def _round(self) -> Iterable[Member[Any]]:
        self._rounds += 1
        return in_both_directions(self._rounds, self._lockstep.members)


def _keep(store: HostStore, gradient: Tensor) -> Callable[[], Tensor]:
    return store.hold(gradient).take


def _distance(known: Tensor | None, mean: Tensor) -> float:
    return math.inf if known is None else float((known - mean).norm())
