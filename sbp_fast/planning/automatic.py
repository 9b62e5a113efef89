"""``micro_batch_size="auto"`` and ``activations="auto"``: what a plan gives for batch and memory."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..activations import Activations, Automatic, Policy
from ..batches import MicroBatch, rows
from ..memory import format_bytes
from ..memory.device_budget import free_bytes
from ..result import StepResult
from .fake_copies import LossFunction
from .plan import no_micro_batch_fits, predict_peaks
from .policies import KEEP, Choice, PolicyPeaks

_log = logging.getLogger("sbp_fast")

# Of the memory that is free: the rest is for workspaces of libraries, which no plan sees.
_SHARE = 0.9

# On a CPU without a budget. Larger ones are no faster there, and leave the caches.
_ON_CPU = 32

# Of a predicted peak. What a measured one differs by less changes no choice.
_CLOSE = 0.02


@dataclass
class _Trial:
    """A choice that was just made: for what, and in how many steps it was followed."""

    key: tuple[int, Policy | None]
    choice: Choice
    steps: int = 0


class AutomaticSize:
    """Chooses micro-batch sizes and what becomes of activations, for the batches of one accumulator.

    Large batches of as many samples are planned once. Where memory runs out all the same, micro-batches
    become smaller, and the policy stays: what the plan did not see does not tell it what to do instead.

    Args:
        model, loss_fn, optimizer: of the accumulator.
        device: of the step.
        budget: bytes of device memory; None for what is free.
        wanted: samples computed at once; None for as many as memory allows.
        activations: of the accumulator; :class:`Automatic` ones are told what to follow.
        options: of the accumulator, by name.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        budget: int | None,
        wanted: int | None,
        activations: Activations,
        options: Mapping[str, Any],
    ) -> None:
        self._model, self._loss_fn, self._optimizer = model, loss_fn, optimizer
        self._device = device
        self._budget = budget
        self._wanted = wanted
        self._automatic = activations if isinstance(activations, Automatic) else None
        self._options = dict(options)
        # By samples, and by the policy that a step under way is bound to.
        self._chosen: dict[tuple[int, Policy | None], tuple[int, Policy | None]] = {}
        # What steps were found to need beyond their plans, in bytes.
        self._excess = 0
        self._last: _Trial | None = None
        self._corrected: set[tuple[int, Policy | None]] = set()
        # The most recent plan: where it is corrected, it need not be made again.
        self._planned: tuple[int, PolicyPeaks | None] | None = None

    def size_for(self, whole: MicroBatch) -> int:
        """The size with the shortest step, or the wanted one; activations follow what suits it, unless a
        step is under way.

        Args:
            whole: the large batch, or one item of its stream.

        Raises:
            BudgetError: not even one sample fits; the message says which budget would do.
        """
        automatic = self._automatic
        bound_to = None
        if automatic is not None and automatic.is_running:
            bound_to = automatic.policy
        key = whole.samples, bound_to
        if key not in self._chosen:
            self._chosen[key] = self._choose(whole, bound_to)
        size, policy = self._chosen[key]
        if self._last is not None and self._last.key != key:
            # A stream of items of several sizes: no telling which of them has needed the most.
            self._last = None
        if automatic is not None and policy is not None:
            automatic.policy = policy
        return size

    def _choose(self, whole: MicroBatch, bound_to: Policy | None) -> tuple[int, Policy | None]:
        if self._wanted is not None and (self._automatic is None or bound_to is not None):
            return self._wanted, bound_to
        batch_size = whole.samples
        if self._budget is None and self._device.type == "cpu":
            return min(_ON_CPU, batch_size), bound_to
        if self._planned is None or self._planned[0] != batch_size:
            self._planned = batch_size, self.peaks(whole)
        peaks = self._planned[1]
        if peaks is None:
            # Where it does not fit, the step finds a smaller one.
            return self._wanted or batch_size, bound_to or KEEP
        limit = (self._budget or _available(self._device)) - self._excess
        if self._wanted is not None:
            size = min(self._wanted, batch_size)
            choice = peaks.best_at(size, limit)
        else:
            best = peaks.best(limit) if bound_to is None else peaks.largest(bound_to, limit)
            if best is None:
                raise no_micro_batch_fits(limit, peaks)
            choice = best
        if self._automatic is not None:
            self._automatic.learn(peaks.writes)
        _log.info(
            "a batch of %d: %s, with a predicted peak of %s within %s",
            batch_size,
            choice,
            format_bytes(choice.peak.device_bytes),
            format_bytes(limit),
        )
        self._last = _Trial((batch_size, bound_to), choice)
        return self._wanted or choice.micro_batch_size, choice.policy

    def learn_from(self, result: StepResult) -> None:
        """Corrects a new choice by the first step that shows what it needs: the second, for which the
        optimizer's state is there from the beginning. The next large batch is chosen for anew then, once.
        """
        trial = self._last
        if trial is None or result.skipped or result.peak_bytes is None:
            return
        if result.micro_batch_size != trial.choice.micro_batch_size:
            self._last = None
            return
        trial.steps += 1
        if trial.steps < 2:
            return
        self._last = None
        predicted = trial.choice.peak.device_bytes
        excess = result.peak_bytes - predicted
        if trial.key in self._corrected or abs(excess - self._excess) <= _CLOSE * predicted:
            return
        _log.info(
            "a step of %d needs %s where %s were predicted; it is planned with that from now on",
            trial.key[0],
            format_bytes(result.peak_bytes),
            format_bytes(predicted),
        )
        self._excess = excess
        self._corrected.add(trial.key)
        del self._chosen[trial.key]

    def advice(self, whole: MicroBatch) -> str:
        """What an error may add: the smallest budget that would do, as far as that can be predicted."""
        peaks = self.peaks(whole)
        if peaks is None:
            return ""
        least = peaks.least()
        return (
            f". The smallest memory_budget that would do is {least.peak.device_bytes} bytes "
            f"({format_bytes(least.peak.device_bytes)}), with {least}"
        )

    def peaks(self, whole: MicroBatch) -> PolicyPeaks | None:
        """What steps would need; None, and a line in the log, where the model cannot be planned."""
        inputs = rows(whole.inputs, 0, 1)
        sample = inputs if self._loss_fn is None else (inputs, rows(whole.targets, 0, 1))
        try:
            return predict_peaks(
                self._model,
                self._loss_fn,
                sample,
                batch_size=whole.samples,
                device=self._device,
                optimizer=self._optimizer,
                **self._options,
            )
        except Exception as reason:
            _log.info("the step is not planned: %s: %s", type(reason).__name__, reason)
            return None


def _available(device: torch.device) -> int:
    """What a step may have in all: free memory, and what this process has there already."""
    return int(_SHARE * (free_bytes(device) + torch.cuda.memory_allocated(device)))
