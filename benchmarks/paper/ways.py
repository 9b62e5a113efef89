"""The ways to make the step of one large batch that the tables compare."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sbp_fast import StreamedAccumulator
from sbp_fast.memory import memory_budget

# The paper's WSBP: the whole large batch at once, within the budget.
WITHOUT = "without SBP"
SBP = "SBP"
# Micro-batches of SBP's size, each with batch norm statistics of its own: what one writes by hand.
PLAIN = "plain accumulation"
# The whole large batch at once, with all the memory there is.
TRUTH = "full batch, no budget"
WAYS = (WITHOUT, SBP, PLAIN, TRUTH)


@dataclass(frozen=True)
class Setting:
    """What a way needs to know.

    Attributes:
        budget: bytes of device memory; None: no limit.
        micro_batch: samples computed at once by :data:`SBP` and :data:`PLAIN`.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss_fn: nn.Module
    device: torch.device
    budget: int | None
    micro_batch: int


@dataclass(frozen=True)
class Step:
    """What a step needed.

    Attributes:
        peak_bytes: of device memory, parameters and optimizer state included.
        host_bytes: of host memory in which activations waited.
        micro_batch: samples computed at once.
    """

    peak_bytes: int
    host_bytes: int
    micro_batch: int


# Takes images and targets, on the host.
MakeStep = Callable[[Tensor, Tensor], Step]


def make_step(way: str, setting: Setting) -> MakeStep:
    """A function that makes one optimizer step. It raises torch.OutOfMemoryError beyond the budget.

    Args:
        way: one of :data:`WAYS`.
    """
    if way == SBP:
        return _streamed(setting)
    return _by_hand(setting, setting.micro_batch if way == PLAIN else None)


def accumulator_of(setting: Setting, *, batch_norm: str = "exact") -> StreamedAccumulator:
    with warnings.catch_warnings():
        # That batch norm by micro-batch makes a difference is what the tables show.
        warnings.simplefilter("ignore", UserWarning)
        return StreamedAccumulator(
            setting.model,
            setting.optimizer,
            setting.loss_fn,
            micro_batch_size=setting.micro_batch,
            memory_budget=setting.budget,
            batch_norm=batch_norm,
        )


def _streamed(setting: Setting) -> MakeStep:
    accumulator = accumulator_of(setting)

    def step(images: Tensor, targets: Tensor) -> Step:
        result = accumulator.step(images, targets)
        return Step(result.peak_bytes or 0, result.host_bytes, result.micro_batch_size)

    return step


def _by_hand(setting: Setting, micro_batch: int | None) -> MakeStep:
    memory = memory_budget(setting.device, setting.budget)
    memory.track([*setting.model.parameters(), *setting.model.buffers()])

    def step(images: Tensor, targets: Tensor) -> Step:
        at_once = micro_batch or len(images)
        memory.reset_peak()
        with memory:
            accumulate(setting, images, targets, at_once)
            setting.optimizer.step()
            setting.optimizer.zero_grad()
        return Step(memory.peak_bytes, 0, at_once)

    return step


def accumulate(setting: Setting, images: Tensor, targets: Tensor, micro_batch: int) -> None:
    """Adds the gradient of the mean loss to ``p.grad``, ``micro_batch`` samples at a time."""
    pairs = zip(images.split(micro_batch), targets.split(micro_batch), strict=True)
    for some, expected in pairs:
        loss = setting.loss_fn(setting.model(some.to(setting.device)), expected.to(setting.device))
        (loss * (len(some) / len(images))).backward()
