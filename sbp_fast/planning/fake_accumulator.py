"""An accumulator whose step runs on tensors without memory, and says in which phase it is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..accumulator import StreamedAccumulator
from ..activations import Activations
from ..batches import MicroBatch, PyTree, copied, has_samples
from ..gradients import Accumulators
from ..gradients.accumulators import accumulator_dtype, usual_bucket_bytes
from ..invariance.layout import NO_SAMPLES, Layout, Layouts, Site
from ..large_batch import LargeBatch
from ..memory.fake_bytes import FakeLiveBytes
from ..parameters import Parameters
from ..result import StepResult
from ..streaming import Arrival
from ..update import Update
from .fake_copies import LossFunction

# Of an H100. The cards that are planned for without being there differ; the share of a step is small.
_L2_BYTES = 50 << 20
FORWARD, BACKWARD, UPDATE, JOINT = "forward", "backward", "update", "joint"


class OnFakes(StreamedAccumulator):
    """An accumulator whose tensors are fake, on a CPU that may stand for a CUDA device."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss_fn: LossFunction,
        *,
        counter: FakeLiveBytes,
        batch_size: int,
        on_cuda: bool,
        device: torch.device,
        activations: Activations,
        **options: Any,
    ) -> None:
        # The weight of a loss, and so its normalization, is no matter of memory.
        if not options.get("cross_sample_loss"):
            options["normalization"] = _one
        super().__init__(model, optimizer, loss_fn, micro_batch_size=1, probe=False, **options)
        self._activations = activations
        self._counter = counter
        self._update = _Answered(optimizer, counter)
        self._batch_size = batch_size
        self._samples = 0
        self._on_cuda = on_cuda
        self.gradient_bytes = 0
        self._bucket_bytes = _cuda_bucket_bytes(device) if on_cuda else None
        if self._layouts is not None:
            self._layouts = _Anywhere()

    def _prepare_for(self, parameters: Parameters) -> None:
        super()._prepare_for(parameters)
        if self._cross_sample_loss:
            joint = partial(self._joint_loss, self._forward.loss_fn)
            self._forward = replace(self._forward, loss_fn=joint)

    @property
    def meets(self) -> bool:
        """Whether all micro-batches run forward before the first runs back."""
        return self._must_meet()

    @property
    def waits_for_all(self) -> bool:
        return self._must_meet() or self._cross_sample_loss

    @contextmanager
    def treating(self, activations: Activations) -> Iterator[None]:
        """While inside, activations are treated in this way."""
        before, self._activations = self._activations, activations
        try:
            yield
        finally:
            self._activations = before

    def note_batch_norm(self, is_called: bool) -> None:
        """What a look at real samples would have found."""
        self._survey.calls_batch_norm = is_called

    def parameters_and_buffers(self) -> list[Tensor]:
        buffers = (buffer for module in self._modules for buffer in module.buffers())
        return [*self._parameters.all, *buffers]

    def step_in(
        self, micro_batch_size: int, samples: int, inputs: PyTree, targets: PyTree
    ) -> StepResult:
        self._samples = samples
        self._fitting.wanted = micro_batch_size
        self._counter.phase = FORWARD
        return self.step(inputs, targets)

    def _new_accumulators(self) -> Accumulators:
        return _Announcing(
            self._counter, self._hooks, backend=self._backend, bucket_bytes=self._bucket_bytes
        )

    def _joint_loss(self, loss_fn: LossFunction, outputs: PyTree, targets: PyTree) -> Tensor:
        """Of as many samples as the large batch has, however few are computed: what compares all with all
        grows with the square of their number."""
        assert loss_fn is not None
        self._counter.phase = JOINT
        outputs, targets = (
            pytree.tree_map(self._as_of_the_large_batch, tree) for tree in (outputs, targets)
        )
        loss: Tensor = loss_fn(outputs, targets)
        return loss

    def _as_of_the_large_batch(self, leaf: Any) -> Any:
        if self._samples == self._batch_size or not has_samples(leaf):
            return leaf
        rows, rest = divmod(leaf.shape[0] * self._batch_size, self._samples)
        return leaf if rest else leaf[:1].expand(rows, *leaf.shape[1:]).clone()

    def _arrivals(self, micro_batches: Iterable[MicroBatch], keep: bool) -> Iterator[Arrival]:
        if not self._on_cuda:
            return super()._arrivals(micro_batches, keep)
        return _sent_ahead(micro_batches)

    def _finalise(self, large_batch: LargeBatch) -> None:
        self._counter.phase = UPDATE
        super()._finalise(large_batch)
        # In their own precision, which that of p.grad need not be.
        self.gradient_bytes = sum(
            parameter.numel() * accumulator_dtype(parameter.dtype).itemsize
            for parameter in self._parameters.trainable
            if parameter.grad is not None
        )
        # Asked next: whether all is finite.
        self._counter.yes = True


class _Answered(Update):
    """An update, which comes once the question whether all is finite has been answered."""

    def __init__(self, optimizer: torch.optim.Optimizer, counter: FakeLiveBytes) -> None:
        super().__init__(optimizer, scaler=None)
        self._counter = counter

    def make(self) -> None:
        self._counter.yes = False
        super().make()


class _Announcing(Accumulators):
    """Says when a backward pass runs."""

    def __init__(self, counter: FakeLiveBytes, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._counter = counter

    @contextmanager
    def collecting(self, scale: float, left_out: frozenset[int] = frozenset()) -> Iterator[None]:
        if self._counter.phase != JOINT:
            self._counter.phase = BACKWARD
        with super().collecting(scale, left_out):
            yield
        self._counter.phase = FORWARD


def _sent_ahead(micro_batches: Iterable[MicroBatch]) -> Iterator[Arrival]:
    """As to a CUDA device: each is copied, and the next one before it is needed."""
    remaining = iter(micro_batches)
    following = _sent(next(remaining, None))
    while following is not None:
        arrived = following
        following = _sent(next(remaining, None))
        yield Arrival(arrived, is_last=following is None)


def _sent(micro_batch: MicroBatch | None) -> MicroBatch | None:
    if micro_batch is None:
        return None
    return MicroBatch(copied(micro_batch.inputs), copied(micro_batch.targets), micro_batch.samples)


class _Anywhere(Layouts):
    """Which sample a mask belongs to is no matter of memory."""

    def of(self, site: Site, module: nn.Module | None, tensor: Tensor, samples: int) -> Layout:
        return NO_SAMPLES


def _one(_: Any) -> float:
    return 1.0


def _cuda_bucket_bytes(device: torch.device) -> int:
    return usual_bucket_bytes(device) if torch.cuda.is_available() else _L2_BYTES // 2
