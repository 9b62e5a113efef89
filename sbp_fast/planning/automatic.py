"""``micro_batch_size="auto"``: the size that a plan gives, for the batch and the memory at hand."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..batches import MicroBatch, rows
from ..memory import format_bytes
from ..memory.device_budget import free_bytes
from .choice import best_micro_batch_size
from .fake_copies import LossFunction
from .peak_model import PeakModel
from .plan import no_micro_batch_fits, predict_peak

_log = logging.getLogger("sbp_fast")

# Of the memory that is free: the rest is for workspaces of libraries, which no plan sees.
_SHARE = 0.9

# On a CPU without a budget. Larger ones are no faster there, and leave the caches.
_ON_CPU = 32


class AutomaticSize:
    """Chooses micro-batch sizes for the large batches of one accumulator.

    Args:
        model, loss_fn, optimizer: of the accumulator.
        device: of the step.
        budget: bytes of device memory; None for what is free.
        options: of the accumulator, by name.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        budget: int | None,
        options: Mapping[str, Any],
    ) -> None:
        self._model, self._loss_fn, self._optimizer = model, loss_fn, optimizer
        self._device = device
        self._budget = budget
        self._options = dict(options)
        self._chosen: dict[int, int] = {}

    def size_for(self, whole: MicroBatch) -> int:
        """The size with the fewest micro-batches that fit, as even as they come.

        Args:
            whole: the large batch, or one item of its stream.

        Raises:
            BudgetError: not even one sample fits; the message says which budget would do.
        """
        if whole.samples not in self._chosen:
            self._chosen[whole.samples] = self._choose(whole)
        return self._chosen[whole.samples]

    def _choose(self, whole: MicroBatch) -> int:
        batch_size = whole.samples
        if self._budget is None and self._device.type == "cpu":
            return min(_ON_CPU, batch_size)
        peaks = self.peaks(whole)
        if peaks is None:
            # Where it does not fit, the step finds a smaller one.
            return batch_size
        limit = self._budget or _available(self._device)
        largest = peaks.largest_within(limit)
        if largest is None:
            raise no_micro_batch_fits(limit, peaks)
        size = best_micro_batch_size(batch_size, largest)
        _log.info(
            "micro_batch_size='auto': %d of %d samples, with a predicted peak of %s within %s",
            *(
                size,
                batch_size,
                format_bytes(peaks.predict(size).device_bytes),
                format_bytes(limit),
            ),
        )
        return size

    def advice(self, whole: MicroBatch) -> str:
        """What an error may add: the smallest budget that would do, as far as that can be predicted."""
        peaks = self.peaks(whole)
        if peaks is None:
            return ""
        size, peak = peaks.smallest_peak()
        return (
            f". The smallest memory_budget that would do is {peak.device_bytes} bytes "
            f"({format_bytes(peak.device_bytes)}), with micro_batch_size={size}"
        )

    def peaks(self, whole: MicroBatch) -> PeakModel | None:
        """What steps would need; None, and a line in the log, where the model cannot be planned."""
        inputs = rows(whole.inputs, 0, 1)
        sample = inputs if self._loss_fn is None else (inputs, rows(whole.targets, 0, 1))
        try:
            return predict_peak(
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
