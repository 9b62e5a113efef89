"""Two ways to the gradient of one batch: streamed, and by plain accumulation."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..accumulator import StreamedAccumulator
from ..batches import MicroBatch, split
from ..loss import LossContract, read_contract
from ..options import autocast_context
from .copies import Copies, computing_in_double, copied, in_double, placed
from .random_state import drawn, seed_all


@dataclass(frozen=True)
class Run:
    """The gradient of every trainable parameter by name, in float64 on the host, and whether random
    numbers were drawn on the way."""

    gradients: dict[str, Tensor]
    drew: bool


@dataclass(frozen=True)
class Ways:
    """One batch, and the model and loss that it is for. Each run has copies of its own.

    Attributes:
        batch: of all samples that are compared.
        options: of the accumulator.
        seed: that every run begins from.
        device: of the model.
        double_device: where float64 is computed.
    """

    originals: Copies
    batch: MicroBatch
    options: Mapping[str, Any]
    seed: int
    device: torch.device
    double_device: torch.device

    def streamed(self, micro_batch_size: int, *, double: bool = False) -> Run:
        """By :meth:`StreamedAccumulator.backward`."""
        copies, device = self._copies(double)
        batch = self._batch(None, double)
        accumulator = self._accumulator(copies, micro_batch_size, double)
        with computing_in_double(device) if double else nullcontext():
            before = self._begin(device)
            accumulator.backward(batch.inputs, batch.targets)
            return self._finished(copies, before, device)

    def accumulated(self, micro_batch_size: int, *, double: bool = False) -> Run:
        """As it is usually written: each micro-batch's loss by its part of the samples, then backward.

        With all samples in one micro-batch, this is the large batch at once in plain PyTorch.
        """
        copies, device = self._copies(double)
        batch = self._batch(device, double)
        contract = plain_contract(copies.loss_fn, self.options)
        autocast = autocast_context(None if double else self.options.get("autocast"), device.type)
        micro_batches = split(
            batch.inputs,
            batch.targets,
            micro_batch_size,
            with_targets=copies.loss_fn is not None,
        )
        with computing_in_double(device) if double else nullcontext(), torch.enable_grad():
            before = self._begin(device)
            for micro_batch in micro_batches:
                with autocast():
                    loss = plain_loss(copies, micro_batch)
                (loss * self._factor(contract, micro_batch.samples)).backward()
            return self._finished(copies, before, device)

    def of_the_first(self, samples: int) -> Ways:
        """The same with less of the batch."""
        inputs, targets = self.batch.inputs, self.batch.targets
        with_targets = self.originals.loss_fn is not None
        return replace(self, batch=split(inputs, targets, samples, with_targets=with_targets)[0])

    def check(self) -> None:
        """Raises what the options have wrong, before anything runs."""
        self._accumulator(copied(self.originals), 1, double=False)
        plain_contract(self.originals.loss_fn, self.options)

    def _accumulator(
        self, copies: Copies, micro_batch_size: int, double: bool
    ) -> StreamedAccumulator:
        return StreamedAccumulator(
            copies.model,
            torch.optim.SGD(copies.trainable.values(), lr=0.0),
            copies.loss_fn,
            micro_batch_size=micro_batch_size,
            **({**self.options, "autocast": None} if double else self.options),
        )

    def _copies(self, double: bool) -> tuple[Copies, torch.device]:
        copies = copied(self.originals)
        if not double:
            return copies, self.device
        return in_double(copies, self.double_device), self.double_device

    def _batch(self, device: torch.device | None, double: bool) -> MicroBatch:
        inputs, targets = (
            placed(tree, device, double=double) for tree in (self.batch.inputs, self.batch.targets)
        )
        return MicroBatch(inputs, targets, self.batch.samples)

    def _begin(self, device: torch.device) -> bytes:
        seed_all(self.seed, device)
        return drawn(device)

    def _finished(self, copies: Copies, before: bytes, device: torch.device) -> Run:
        return Run(
            {
                name: _on_host(torch.zeros_like(p) if p.grad is None else p.grad)
                for name, p in copies.trainable.items()
            },
            drew=drawn(device) != before,
        )

    def _factor(self, contract: LossContract, samples: int) -> float:
        factor = 1.0 if contract.weigh is None else samples / self.batch.samples
        return factor / self.batch.samples**0.5 if contract.inverse_sqrt else factor


def plain_loss(copies: Copies, micro_batch: MicroBatch) -> Tensor:
    """The loss, in plain PyTorch: it shares no code with what is judged by it."""
    model, inputs = copies.model, micro_batch.inputs
    if isinstance(inputs, Mapping):
        outputs = model(**inputs)
    elif type(inputs) is tuple:
        outputs = model(*inputs)
    else:
        outputs = model(inputs)
    if copies.loss_fn is not None:
        loss = copies.loss_fn(outputs, micro_batch.targets)
    elif isinstance(outputs, Tensor):
        loss = outputs
    else:
        of_key = outputs.get("loss") if isinstance(outputs, Mapping) else None
        loss = getattr(outputs, "loss", of_key)
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        what = f"of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(
            f"the loss ({what}) must be a tensor with one element that depends on a trainable parameter"
        )
    return loss.reshape(())


def plain_contract(loss_fn: Any, options: Mapping[str, Any]) -> LossContract:
    """Whether the loss averages, as far as the usual loop goes."""
    if not options.get("cross_sample_loss", False):
        return read_contract(loss_fn, options.get("normalization", "auto"))
    # No declaration goes with it: it is called once. Of the usual loop's losses, those that cannot be
    # read average, as a rule.
    try:
        return read_contract(loss_fn, "auto")
    except ValueError:
        return read_contract(loss_fn, "mean")


def _on_host(gradient: Tensor) -> Tensor:
    if gradient.layout is not torch.strided:
        gradient = gradient.to_dense()
    return gradient.detach().to("cpu", torch.float64)
