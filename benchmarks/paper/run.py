"""One cell: a model trained in one way with one batch size and one seed, or a few steps of it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from sbp_fast.bench import environment
from sbp_fast.memory.out_of_memory import release

from .batches import large_batches
from .data import Dataset
from .evaluation import accuracy, confusion, mean_iou, refresh_statistics
from .gradients import gradient_difference
from .micro_batches import largest_micro_batches
from .models import MODELS, SEGMENTATION
from .profiles import Profile, Training
from .results import FAILED, FINISHED, Cell, Row
from .ways import PLAIN, SBP, Setting, Step, make_step

# For this batch a training's learning rate is meant; others scale it by the root of their ratio: Malladi
# et al., "On the SDEs and Scaling Rules for Adaptive Gradient Algorithms", NeurIPS 2022.
_LEARNING_RATE_BATCH = 256


@dataclass(frozen=True)
class Measured:
    """What a cell gives; None where memory ran out before it was known."""

    steps: tuple[Step, ...]
    milliseconds: tuple[float, ...]
    percent: float | None = None
    gradient_difference: float | None = None


class Runner:
    """Measures the cells of one model.

    Args:
        progress: is called after each step.
    """

    def __init__(
        self,
        profile: Profile,
        training: Training,
        dataset: Dataset,
        device: torch.device,
        progress: Callable[[], object],
    ) -> None:
        self._profile, self._training, self._dataset = profile, training, dataset
        self._device, self._progress = device, progress
        self._model = MODELS[training.model]
        self._loss_fn = nn.CrossEntropyLoss()
        model, optimizer = self._fresh(profile.seeds[0], max(profile.batches))
        images, targets = next(large_batches(dataset.train, 1, seed=0))
        self._largest = largest_micro_batches(
            *(model, self._loss_fn, (images, targets), optimizer),
            *(max(profile.batches), profile.budget_bytes, device),
        )

    def run(self, cell: Cell) -> Row:
        """Measures one cell. Memory that runs out is a result."""
        budget = cell.budget or self._profile.budget_bytes[-1]
        largest = self._largest[budget]
        if cell.way in (SBP, PLAIN) and largest is None:
            return self._row(cell, 0, None, f"one sample does not fit in {budget} bytes")
        try:
            measured = self._measure(cell, min(largest or cell.batch, cell.batch))
        except torch.OutOfMemoryError as error:
            # In one line: a line of the file is a row.
            reason = " ".join(str(error).split())
            release(error, self._device)
            return self._row(cell, 0, None, reason)
        return self._row(cell, measured.steps[-1].micro_batch, measured, "")

    def steps(self, cell: Cell) -> int:
        """How many steps the cell makes, if memory does not run out."""
        return self._training.steps(cell.batch) if cell.trained else self._profile.probe_steps

    def _measure(self, cell: Cell, micro_batch: int) -> Measured:
        model, optimizer = self._fresh(cell.seed, cell.batch)
        setting = Setting(
            *(model, optimizer, self._loss_fn, self._device),
            budget=cell.budget or None,
            micro_batch=micro_batch,
        )
        batches = large_batches(self._dataset.train, cell.batch, cell.seed)
        difference = None
        if cell.trained and cell.way in (SBP, PLAIN) and cell.seed == self._profile.seeds[0]:
            first = next(large_batches(self._dataset.train, cell.batch, cell.seed))
            difference = gradient_difference(cell.way, setting, *first)
        steps = self.steps(cell)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            *(optimizer, optimizer.param_groups[0]["lr"], steps), cycle_momentum=False
        )
        step = make_step(cell.way, setting)
        made: list[Step] = []
        milliseconds: list[float] = []
        for (images, targets), _ in zip(batches, range(steps), strict=False):
            start = time.perf_counter()
            made.append(step(images, targets))
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            milliseconds.append(1e3 * (time.perf_counter() - start))
            schedule.step()
            self._progress()
        percent = self._evaluate(model) if cell.trained else None
        return Measured(tuple(made), tuple(milliseconds), percent, difference)

    def _fresh(self, seed: int, batch: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        """The same weights for the same seed, whatever the way."""
        torch.manual_seed(seed)
        model = self._model.make(
            self._dataset.classes, self._profile.pixels, reduced=self._profile.reduced
        ).to(self._device)
        rate = self._training.learning_rate * (batch / _LEARNING_RATE_BATCH) ** 0.5
        return model, torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)

    def _evaluate(self, model: nn.Module) -> float:
        samples = self._profile.test_samples
        refresh_statistics(model, self._dataset.train, samples, self._device)
        counts = confusion(
            *(model, self._dataset.test, self._dataset.classes),
            *(samples, self._device),
        )
        return mean_iou(counts) if self._model.task == SEGMENTATION else accuracy(counts)

    def _row(self, cell: Cell, micro_batch: int, measured: Measured | None, reason: str) -> Row:
        step_ms = None
        if measured is not None:
            # The first step makes the optimizer's state, and looks at the model.
            step_ms = statistics.median(measured.milliseconds[1:] or measured.milliseconds)
        return Row(
            **vars(cell) | {"trained": int(cell.trained)},
            outcome=FAILED if measured is None else FINISHED,
            reason=reason,
            dataset=self._dataset.name,
            micro_batch=micro_batch,
            steps=0 if measured is None else len(measured.steps),
            percent=None if measured is None else measured.percent,
            step_ms=step_ms,
            sample_ms=None if step_ms is None else step_ms / cell.batch,
            peak_bytes=None if measured is None else max(s.peak_bytes for s in measured.steps),
            host_bytes=None if measured is None else max(s.host_bytes for s in measured.steps),
            gradient_difference=None if measured is None else measured.gradient_difference,
            device=environment.device_name(self._device),
            threads=torch.get_num_threads(),
            revision=environment.revision(),
            date=environment.now(),
        )
