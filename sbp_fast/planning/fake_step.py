"""The accumulator's own step on tensors without memory, and what it would need."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
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

from ..activations import Automatic, Policy
from ..activations.blocks import find_blocks
from ..batches import MicroBatch
from ..certificate.copies import left_alone
from ..invariance.intercept import answering, native
from ..memory.fake_bytes import CUDA_GRANULE, FakeLiveBytes
from ..parameters import modules_of
from ..rehearsal import Rehearsal
from ..result import StepResult
from .block_costs import BlockCost, Weighing
from .fake_accumulator import BACKWARD, FORWARD, JOINT, UPDATE, OnFakes
from .fake_copies import LossFunction, MakeOptimizer, fake_batch, fake_copies
from .peak import Reading

_HOST = torch.device("cpu")


class FakeSteps:
    """Steps of any micro-batch size of one model, run on fake copies of it.

    Args:
        model, loss_fn: as in :class:`sbp_fast.StreamedAccumulator`; they stay as they are.
        optimizer: an optimizer, or a callable that makes one from parameters.
        sample: one or more samples with their targets, of which only shapes and dtypes count.
        batch_size: samples of the large batch, which a loss that compares them sees together.
        device: what is planned for, ``cpu`` or ``cuda``; it need not be there.
        options: of the accumulator.

    Attributes:
        waits_for_all: whether something of each micro-batch stays until all have come.
        meets: whether all micro-batches run forward before the first runs back.

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
        options: Mapping[str, Any],
    ) -> None:
        self._sample = sample
        self._device = device
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
            self._copy_of = dict(zip(model.modules(), self._model.modules(), strict=True))
            # Of the model itself: its copy is not compiled.
            self._blocks = find_blocks(model)
            self._copied_blocks = self._blocks.in_copy(self._copy_of)
            self._activations = Automatic(
                modules_of(self._model, self._loss_fn),
                options.pop("host_budget", None),
                self._copied_blocks,
            )
            if on_cuda:
                _update_as_on_cuda(self._optimizer)
            self._accumulator = OnFakes(
                *(self._model, self._optimizer, self._loss_fn),
                counter=self._counter,
                batch_size=batch_size,
                on_cuda=on_cuda,
                device=device,
                activations=self._activations,
                **options,
            )
            self._counter.track(self._accumulator.parameters_and_buffers())
        self._make_first_step()

    @property
    def waits_for_all(self) -> bool:
        return self._accumulator.waits_for_all

    @property
    def meets(self) -> bool:
        return self._accumulator.meets

    @property
    def blocks(self) -> int:
        """How many the model has."""
        return len(self._blocks.keys)

    def block_costs(self) -> dict[nn.Module, BlockCost]:
        """Of the blocks in which micro-batches do not meet, by key, in the order of computation."""
        weighing = Weighing(
            self._copied_blocks,
            self._counter,
            lambda: self._counter.phase == FORWARD,
            self._device.type,
        )
        with self._accumulator.treating(weighing):
            self._step(2, 2)
        original_of = {copied: original for original, copied in self._copy_of.items()}
        return {original_of[key]: cost for key, cost in weighing.costs(samples=2).items()}

    def writes(self) -> dict[nn.Module, bool]:
        """By key, whether a block changes its inputs in place, of those that have been computed again."""
        return {
            key: self._activations.writes[copied]
            for key, copied in self._copy_of.items()
            if copied in self._activations.writes
        }

    def _follow(self, policy: Policy) -> None:
        """Blocks that are computed again have been before, as others will find them."""
        recomputed = policy.recomputed
        if policy.name == "recompute" and not self._activations.writes:
            self._activations.policy = Policy("recompute")
            self._step(2, 2)
        if recomputed is not None:
            recomputed = frozenset(self._copy_of[key] for key in recomputed)
        self._activations.policy = replace(policy, recomputed=recomputed)

    def read(self, policy: Policy, micro_batch_size: int, samples: int) -> Reading:
        """What one step on a large batch of so many samples needs, once there have been others.

        Args:
            policy: what becomes of activations.

        Raises:
            ValueError: the model's computation depends on values, which fake tensors have not.
        """
        self._follow(policy)
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
