"""The accumulator's own step on tensors without memory, and what it would need."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.utils import _pytree as pytree

from ..accumulator import StreamedAccumulator
from ..batches import MicroBatch, PyTree, copied, has_samples
from ..certificate.copies import left_alone
from ..gradients import Accumulators
from ..gradients.accumulators import accumulator_dtype, usual_bucket_bytes
from ..invariance.intercept import answering, native
from ..invariance.layout import NO_SAMPLES, Layout, Layouts, Site
from ..large_batch import LargeBatch
from ..memory.fake_bytes import CUDA_GRANULE, FakeLiveBytes
from ..parameters import Parameters, modules_of
from ..rehearsal import Rehearsal
from ..result import StepResult
from ..splitting import Splitting
from ..streaming import Arrival
from ..update import Update
from .fake_copies import LossFunction, MakeOptimizer, fake_batch, fake_copies
from .peak import Reading

_HOST = torch.device("cpu")
# Of an H100. The cards that are planned for without being there differ; the share of a step is small.
_L2_BYTES = 50 << 20
FORWARD, BACKWARD, UPDATE, JOINT = "forward", "backward", "update", "joint"
# How the accumulator may be told to treat activations, and how to run it on fake tensors.
POLICIES = ("keep", "recompute", "offload")


def check_policy(policy: str) -> None:
    if policy not in POLICIES:
        raise ValueError(
            f"activations is {policy!r}; what can be planned is " + ", ".join(map(repr, POLICIES))
        )


class FakeSteps:
    """Steps of any micro-batch size of one model, run on fake copies of it.

    Args:
        model, loss_fn: as in :class:`sbp_fast.StreamedAccumulator`; they stay as they are.
        optimizer: an optimizer, or a callable that makes one from parameters.
        sample: one or more samples with their targets, of which only shapes and dtypes count.
        batch_size: samples of the large batch, which a loss that compares them sees together.
        device: what is planned for, ``cpu`` or ``cuda``; it need not be there.
        policy: what becomes of activations, one of :data:`POLICIES`.
        options: of the accumulator.

    Attributes:
        waits_for_all: whether something of each micro-batch stays until all have come.

    Raises:
        TypeError, ValueError, NotImplementedError: what the accumulator would raise, or a model that
            cannot be copied or run without values; the message says what to do.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        optimizer: torch.optim.Optimizer | MakeOptimizer,
        sample: MicroBatch,
        batch_size: int,
        device: torch.device,
        policy: str,
        options: Mapping[str, Any],
    ) -> None:
        check_policy(policy)
        self._sample = sample
        self._originals = [
            parameter for module in modules_of(model, loss_fn) for parameter in module.parameters()
        ]
        self._fakes = FakeTensorMode(allow_non_fake_inputs=True)
        on_cuda = device.type == "cuda"
        self._counter = FakeLiveBytes(CUDA_GRANULE if on_cuda else 1)
        options = dict(options)
        if on_cuda:
            # Autograd adds up by itself on the CPU alone, and CUDA's autocast would not reach the fakes.
            options["backend"] = "reference"
            if isinstance(options.get("autocast"), torch.autocast):
                options["autocast"] = options["autocast"].fast_dtype
        with self._pretending():
            copies = fake_copies(model, loss_fn, optimizer)
            self._model, self._loss_fn, self._optimizer = copies
            if on_cuda:
                _update_as_on_cuda(self._optimizer)
            self._accumulator = _OnFakes(
                *(self._model, self._optimizer, self._loss_fn),
                counter=self._counter,
                batch_size=batch_size,
                on_cuda=on_cuda,
                device=device,
                activations=policy,
                **options,
            )
            self._counter.track(self._accumulator.parameters_and_buffers())
        self._make_first_step()

    @property
    def waits_for_all(self) -> bool:
        return self._accumulator.waits_for_all

    def read(self, micro_batch_size: int, samples: int) -> Reading:
        """What one step on a large batch of so many samples needs, once there have been others.

        Raises:
            ValueError: the model's computation depends on values, which fake tensors have not.
        """
        before, state = self._counter.live_bytes, self._state_bytes()
        result = self._step(micro_batch_size, samples)
        gradients = self._accumulator.gradient_bytes
        # From the second micro-batch on, unless all forward passes come before the first backward pass.
        in_forward = result.micro_batches > 1 and not self._accumulator.meets
        peaks = self._counter.peaks
        return Reading(
            parameters=before - state,
            optimizer=state,
            gradients=gradients,
            gradients_in_forward=gradients if in_forward else 0,
            forward_peak=peaks[FORWARD],
            backward_peak=peaks[BACKWARD],
            update_peak=peaks.get(UPDATE, 0),
            joint_peak=peaks.get(JOINT, 0),
            host_peak=result.host_bytes,
        )

    def _make_first_step(self) -> None:
        """From the second one on there are the optimizer's state and copies of buffers. The first also
        tells whether the model calls batch norm without having a layer for it."""
        listener = _BatchNormListener()
        with answering(listener):
            # On two samples, since a batch norm has no variance over one.
            self._step(2, 2)
        self._accumulator.note_batch_norm(listener.heard)

    def _step(self, micro_batch_size: int, samples: int) -> StepResult:
        with self._pretending():
            inputs = fake_batch(self._sample.inputs, samples)
            targets = fake_batch(self._sample.targets, samples)
            with self._counter:
                self._counter.reset_peak()
                return self._accumulator.step_in(micro_batch_size, samples, inputs, targets)

    @contextmanager
    def _pretending(self) -> Iterator[None]:
        """A context in which tensors are fake, and after which nothing of the caller's has changed."""
        with (
            left_alone(self._originals),
            Rehearsal((), _HOST),
            _saying_what_needs_values(),
            self._fakes,
            torch.enable_grad(),
            # A default device of the caller's is no place for what a step makes.
            _HOST,
        ):
            yield

    def _state_bytes(self) -> int:
        leaves = pytree.tree_leaves(list(self._optimizer.state.values()))
        return self._counter.bytes_in(leaf for leaf in leaves if isinstance(leaf, Tensor))


class _OnFakes(StreamedAccumulator):
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
        **options: Any,
    ) -> None:
        # The weight of a loss, and so its normalization, is no matter of memory.
        if not options.get("cross_sample_loss"):
            options["normalization"] = _one
        super().__init__(model, optimizer, loss_fn, micro_batch_size=1, probe=False, **options)
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
        self._splitting = Splitting(self._loss_fn, micro_batch_size)
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


class _BatchNormListener:
    """Hears calls that nobody else answers: of models that call the function by themselves."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.heard = False

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
    ) -> Any:
        self.heard |= training
        return native("batch_norm")(
            input, running_mean, running_var, weight, bias, training, momentum, eps
        )


class _Anywhere(Layouts):
    """Which sample a mask belongs to is no matter of memory."""

    def of(self, site: Site, module: nn.Module | None, tensor: Tensor, samples: int) -> Layout:
        return NO_SAMPLES


def _one(_: Any) -> float:
    return 1.0


def _cuda_bucket_bytes(device: torch.device) -> int:
    return usual_bucket_bytes(device) if torch.cuda.is_available() else _L2_BYTES // 2


def _update_as_on_cuda(optimizer: torch.optim.Optimizer) -> None:
    """There optimizers take all parameters at once, unless they are told otherwise."""
    for group in (optimizer.defaults, *optimizer.param_groups):
        if "foreach" in group and group["foreach"] is None and not group.get("fused"):
            group["foreach"] = True


@contextmanager
def _saying_what_needs_values() -> Iterator[None]:
    try:
        yield
    except (
        DataDependentOutputException,
        DynamicOutputShapeException,
        UnsupportedOperatorException,
    ) as error:
        raise ValueError(
            f"the model, its loss or its optimizer calls {error.func}, whose result depends on values or "
            "is not known without computing it; a plan has shapes only: plan the model without that part "
            "(tensor.item(), nonzero(), boolean indexing), or measure a step under "
            "sbp_fast.memory.memory_budget"
        ) from error
