"""How much will wait in host memory: known before the step starts, from one micro-batch's forward."""

from __future__ import annotations

import math
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils import _pytree as pytree

from .. import ops
from ..batches import MicroBatch, copied
from ..forward import Forward
from ..invariance.batch_norm_calls import BeginGraph
from ..invariance.intercept import answering, native
from ..invariance.statistics import Moments, forward_coefficients, inverse_deviation
from ..memory import format_bytes
from ..memory.host_store import Held, HostBudgetError, HostStore
from ..rehearsal import Rehearsal
from ..streaming import moved


class WaitingBytes:
    """Checks a large batch against the host's budget. Measures once for every size of micro-batch.

    Args:
        budget: bytes of host memory.
        spill_directory: of files for what is beyond it; None for none.
    """

    def __init__(self, budget: int, spill_directory: Path | None) -> None:
        self._budget = budget
        self._spill_directory = spill_directory
        self._known: dict[Any, int] = {}

    def check(
        self,
        micro_batches: Sequence[MicroBatch],
        forward: Forward,
        modules: Sequence[nn.Module],
        store: HostStore,
    ) -> None:
        """Runs the first micro-batch where its size is new, without a trace.

        Args:
            micro_batches: the whole large batch.
            modules: of the step.
            store: where what waits will be kept; empty.

        Raises:
            HostBudgetError: there is too little room for the large batch; the message says for how many
                samples there is enough.
        """
        first = moved(micro_batches[0], store.device)
        shapes = tuple(
            leaf.shape
            for leaf in pytree.tree_leaves((first.inputs, first.targets))
            if isinstance(leaf, Tensor)
        )
        if shapes not in self._known:
            self._known[shapes] = bytes_that_wait(forward, first, modules, store)
        samples = sum(micro_batch.samples for micro_batch in micro_batches)
        per_sample = self._known[shapes] / first.samples
        needed = math.ceil(per_sample * samples)
        room, places = self._budget, f"host_budget is {format_bytes(self._budget)}"
        if self._spill_directory is not None:
            free = shutil.disk_usage(self._spill_directory).free
            room += free
            places += f" and {self._spill_directory} has {format_bytes(free)} free"
        if needed > room:
            raise HostBudgetError(
                f"{format_bytes(needed)} of activations would wait for {samples} samples, but {places}, "
                f"enough for {int(room / per_sample)} samples; use a smaller large batch, a larger "
                "host_budget" + ("" if self._spill_directory else ", or a spill_directory")
            )


def bytes_that_wait(
    forward: Forward,
    micro_batch: MicroBatch,
    modules: Sequence[nn.Module],
    store: HostStore,
) -> int:
    """What one micro-batch keeps from its forward pass, in bytes: batch norm's inputs, and all else that
    its backward pass needs."""
    inputs = copied(micro_batch.inputs)
    store.leave_alone(leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor))
    with (
        Rehearsal(modules, store.device),
        torch.enable_grad(),
        answering(_ByItself(store)),
        saved_tensors_hooks(store.hold, Held.take),
    ):
        outputs = forward.outputs(inputs)
        waiting = store.held_bytes()
        del outputs
    return waiting


class _ByItself:
    """Batch norm with the statistics of one micro-batch, cut and kept as by exact batch norm."""

    def __init__(self, store: HostStore) -> None:
        self.thread = threading.get_ident()
        self._store = store
        self._kept: list[Any] = []

    @property
    def answers(self) -> Mapping[str, Callable[..., Any]]:
        return {"batch_norm": self._batch_norm}

    def is_computing(self, in_autograd: bool) -> bool:
        return not in_autograd

    def _batch_norm(
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
        if not training:
            output: Tensor = native("batch_norm")(
                input, running_mean, running_var, weight, bias, training, momentum, eps
            )
            return output
        self._kept.append((self._store.hold(input), input.grad_fn))
        x = input.detach()
        values = ops.batch_norm_statistics(x)
        moments = Moments(x.numel() // x.shape[1], values[0], values[1])
        coefficients = forward_coefficients(
            moments.mean, inverse_deviation(moments, eps), weight, bias
        )
        origin = torch.empty(0, requires_grad=True)
        normalised: Tensor = BeginGraph.apply(  # type: ignore[no-untyped-call]
            origin, lambda: ops.batch_norm_normalise(x, coefficients)
        )
        return normalised
