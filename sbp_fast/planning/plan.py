"""How large a micro-batch fits: a plan, made without the device and without the model's memory."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import options
from ..activations import Policy
from ..batches import PyTree, split
from ..memory import format_bytes, parse_bytes
from ..report.table import format_table
from .fake_copies import LossFunction, MakeOptimizer
from .fake_step import FakeSteps
from .peak import Peak
from .peak_model import PeakModel
from .policies import PolicyPeaks

_DEVICES = ("cpu", "cuda")
_CHOSEN = "<-"


class BudgetError(ValueError):
    """No micro-batch fits into the budget.

    Attributes:
        smallest_budget: bytes of device memory that would do, at least.
        micro_batch_size: with which they would do.
    """

    def __init__(self, message: str, smallest_budget: int, micro_batch_size: int) -> None:
        super().__init__(message)
        self.smallest_budget = smallest_budget
        self.micro_batch_size = micro_batch_size


@dataclass(frozen=True)
class PlanRow:
    """One way to make the step, and what it is predicted to need.

    Attributes:
        micro_batch_size: samples computed at once.
        micro_batches: in the large batch.
        policy: what becomes of activations: ``"keep"``, ``"recompute"``, ``"recompute 3 of 16 blocks"``,
            ``"offload"``.
        peak: device memory in its parts, and host memory; bytes.
        fits: whether the peak is within the budget.
    """

    micro_batch_size: int
    micro_batches: int
    policy: str
    peak: Peak
    fits: bool


@dataclass(frozen=True)
class Plan:
    """Which micro-batch size to take, and what each would need.

    Attributes:
        rows: by policy, then by micro-batch size; the chosen one is among them.
        micro_batch_size, policy: the choice: the shortest predicted step within the budget.
        batch_size: samples of the large batch.
        budget: bytes of device memory.
        device: that was planned for.
    """

    rows: tuple[PlanRow, ...]
    micro_batch_size: int
    policy: str
    batch_size: int
    budget: int
    device: str

    @property
    def chosen(self) -> PlanRow:
        """The row of the choice."""
        return next(
            row
            for row in self.rows
            if (row.micro_batch_size, row.policy) == (self.micro_batch_size, self.policy)
        )

    def __str__(self) -> str:
        chosen = self.chosen
        header = (
            *("policy", "micro-batch", "micro-batches", "peak"),
            *("parameters", "gradients", "optimizer", "activations", "transient"),
            *("waits on the host", ""),
        )
        return "\n".join(
            [
                f"Batch {self.batch_size} within {format_bytes(self.budget)} on {self.device}: "
                f"micro_batch_size={chosen.micro_batch_size} ({chosen.micro_batches} micro-batches), "
                f"activations={chosen.policy!r}, peak {format_bytes(chosen.peak.device_bytes)}",
                "",
                format_table(header, [_cells(row, row is chosen) for row in self.rows]),
            ]
        )

    def save_plot(self, path: str | Path) -> None:
        """Draws peak memory, in its parts, against the micro-batch size, and the budget.

        Args:
            path: its suffix names the format (``.png``, ``.svg``, ``.pdf``).

        Raises:
            ImportError: matplotlib is not installed; the message says how to get it.
        """
        from ..report.plan_plot import save_plan_figure

        save_plan_figure(Path(path), self)


def plan(
    model: nn.Module,
    loss_fn: LossFunction,
    sample: Any,
    *,
    batch_size: int,
    budget: int | str,
    device: torch.device | str = "cuda",
    optimizer: torch.optim.Optimizer | MakeOptimizer = torch.optim.AdamW,
    activations: str = "keep",
    batch_norm: str = "exact",
    dropout: str = "per_sample",
    cross_sample_loss: bool = False,
    autocast: torch.dtype | torch.autocast | None = None,
    backend: str = "auto",
) -> Plan:
    """Predicts the peak of device memory of a step, and chooses the micro-batch size.

    The accumulator's own step runs on tensors that have shapes but no memory (torch's fake tensors), and
    the storages that would be alive are counted. So neither the device nor memory for the model is
    needed, and model, optimizer and random numbers stay as they are. The model may be anywhere, also made
    under ``torch.device("meta")``.

    Of the sizes within the budget, the one with the shortest step is chosen, ``T(mu) = ceil(B / mu) *
    (alpha + beta * mu)`` (Ravi Kumar and Sivakumar 2025, section 3). While nothing has been timed that is
    the one with the fewest micro-batches, and the smallest for that number. ``activations="auto"`` also
    chooses what becomes of activations: they are kept where that leaves micro-batches of at least 8
    samples; else computing blocks again counts as their share of a third of the step, offloading as much
    as the step, and what a micro-batch costs whatever its size as a third of the time of 8 samples.

    What is not seen: scratch memory inside of one operation (workspaces of cuDNN and cuBLAS), and on CUDA
    what the allocator reserves beyond its tensors, and activations of exact batch norm that stay on the
    device while it has room. Leave the budget some margin for the first two.

    Args:
        model, loss_fn, activations, batch_norm, dropout, cross_sample_loss, autocast, backend: as in
            :class:`sbp_fast.StreamedAccumulator`.
        sample: ``(inputs, targets)``, or inputs where ``loss_fn`` is None: one or more samples of shape
            ``(samples, ...)``, of which only shapes, dtypes and layouts count.
        batch_size: samples in the large batch.
        budget: of device memory, in bytes or as ``"8GiB"``.
        device: to plan for: ``"cuda"`` or ``"cpu"``. It need not be there.
        optimizer: whose state counts, an optimizer over the model's parameters or a callable that makes
            one from parameters.

    Raises:
        BudgetError: not even one sample fits; a ValueError that says which budget would do.
        TypeError, ValueError: an argument is not what it must be, or the model cannot run on shapes
            alone; the message says what to do.
    """
    budget_bytes = parse_bytes(budget)
    device = torch.device(device)
    peaks = predict_peaks(
        model,
        loss_fn,
        sample,
        batch_size=batch_size,
        device=device,
        optimizer=optimizer,
        activations=activations,
        batch_norm=batch_norm,
        dropout=dropout,
        cross_sample_loss=cross_sample_loss,
        autocast=autocast,
        backend=backend,
    )
    choice = peaks.best(budget_bytes)
    if choice is None:
        raise no_micro_batch_fits(budget_bytes, peaks)
    sizes = sorted({*_powers_of_two(batch_size), choice.micro_batch_size, batch_size})
    return Plan(
        rows=tuple(
            _row(size, str(policy), peaks.under(policy), budget_bytes)
            for policy in dict.fromkeys([*peaks.policies, choice.policy])
            for size in sizes
        ),
        micro_batch_size=choice.micro_batch_size,
        policy=str(choice.policy),
        batch_size=batch_size,
        budget=budget_bytes,
        device=str(device),
    )


def predict_peaks(
    model: nn.Module,
    loss_fn: LossFunction,
    sample: Any,
    *,
    batch_size: int,
    device: torch.device,
    optimizer: torch.optim.Optimizer | MakeOptimizer,
    activations: str,
    **accumulator_options: Any,
) -> PolicyPeaks:
    """The peak as a function of the micro-batch size, for whoever chooses it: nothing is measured yet.

    Args:
        model, loss_fn, sample, batch_size, device, optimizer, activations: as in :func:`plan`.
        accumulator_options: of :class:`sbp_fast.StreamedAccumulator`.

    Raises:
        TypeError, ValueError: as :func:`plan`, for all but the budget.
    """
    options.check_model(model)
    options.check_loss_fn(loss_fn)
    options.check_choice("activations", activations)
    if isinstance(batch_size, bool) or not isinstance(batch_size, int):
        raise TypeError(f"batch_size is {batch_size!r}; it must be an int, a number of samples")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1, a number of samples")
    if device.type not in _DEVICES:
        raise ValueError(
            f"device is {str(device)!r}; it must be one of " + ", ".join(map(repr, _DEVICES))
        )
    if not isinstance(optimizer, torch.optim.Optimizer) and not callable(optimizer):
        raise TypeError(
            f"optimizer is a {type(optimizer).__name__}; it must be a torch.optim.Optimizer, or a "
            "callable that makes one from parameters"
        )
    inputs, targets = _in_two(sample, with_targets=loss_fn is not None)
    pieces = split(inputs, targets, sys.maxsize, with_targets=loss_fn is not None)
    steps = FakeSteps(model, loss_fn, optimizer, pieces[0], batch_size, device, accumulator_options)
    return PolicyPeaks(steps, batch_size, activations)


def predict_peak(*arguments: Any, policy: str, **options: Any) -> PeakModel:
    """:func:`predict_peaks` under one policy: ``"keep"``, ``"recompute"`` or ``"offload"``."""
    return predict_peaks(*arguments, activations=policy, **options).under(Policy(policy))


def _in_two(sample: Any, *, with_targets: bool) -> tuple[PyTree, PyTree]:
    if not with_targets:
        return sample, None
    if isinstance(sample, (tuple, list)) and len(sample) == 2:
        return sample[0], sample[1]
    what = (
        f"{type(sample).__name__} of {len(sample)}"
        if isinstance(sample, (tuple, list))
        else type(sample).__name__
    )
    raise ValueError(
        f"sample is a {what}; it must be a pair (inputs, targets), since there is a loss_fn"
    )


def _powers_of_two(batch_size: int) -> list[int]:
    return [1 << power for power in range(batch_size.bit_length())]


def _row(size: int, policy: str, peaks: PeakModel, budget: int) -> PlanRow:
    peak = peaks.predict(size)
    return PlanRow(size, peaks.count(size), policy, peak, peak.device_bytes <= budget)


def no_micro_batch_fits(budget: int, peaks: PolicyPeaks) -> BudgetError:
    """The error that says which budget would do."""
    least = peaks.least()
    needed = least.peak.device_bytes
    fixed = format_bytes(least.peak.parameters + least.peak.optimizer)
    return BudgetError(
        f"no micro-batch of a batch of {peaks.batch_size} fits into {format_bytes(budget)}: the least "
        f"that would do is {needed} bytes ({format_bytes(needed)}), with {least}, of "
        f"which parameters and optimizer state take {fixed}; use a larger budget, an optimizer with less "
        "state, or a smaller model",
        needed,
        least.micro_batch_size,
    )


def _cells(row: PlanRow, is_chosen: bool) -> Sequence[str]:
    peak = row.peak
    sizes = (
        *(peak.device_bytes, peak.parameters, peak.gradients, peak.optimizer),
        *(peak.activations, peak.transient, peak.host_bytes),
    )
    verdict = _CHOSEN if is_chosen else "" if row.fits else "over budget"
    return (
        row.policy,
        str(row.micro_batch_size),
        str(row.micro_batches),
        *map(format_bytes, sizes),
        verdict,
    )
