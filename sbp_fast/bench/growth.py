"""How time and memory grow with the large batch at one micro-batch size: time per sample should not, and
memory not at all (Ravi Kumar and Sivakumar 2025, tables 2 to 5: flat training time from batch 8 on).

And what a micro-batch costs beside its computation: for a model that computes next to nothing, the time
of a step grows by that with every micro-batch.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import nn

from ..memory import format_bytes
from ..report.table import format_table
from .memory import peak_of
from .step import OURS, PLAIN, plain_step, streamed_step
from .timing import measure, stopwatch_for
from .workloads import Workload, make_problem

# Micro-batches of one sample each, of a model with one weight.
_SAMPLES, _CALLS = 256, 3


@dataclass(frozen=True)
class Growth:
    """One batch size of one network.

    Attributes:
        case: network and micro-batch size.
        batch: samples.
        rounds: measurements.
        ms_per_sample: median over the rounds.
        ratio_to_smallest: of time per sample, to that of the smallest batch, median over the rounds.
        device_bytes: the peak of a step.
    """

    case: str
    batch: int
    rounds: int
    ms_per_sample: float
    ratio_to_smallest: float
    device_bytes: int


@dataclass(frozen=True)
class Overhead:
    """Microseconds that a micro-batch takes beside its computation: ours, and the plain loop's."""

    contender: str
    rounds: int
    us_per_micro_batch: float


def measure_growth(
    workloads: Sequence[Workload], rounds: int, device: torch.device, width: int
) -> list[Growth]:
    """Batches of one network, smallest first, in turns."""
    models = [make_problem(workload, device, width) for workload in workloads]
    steps = {
        workload.batch: streamed_step(*problem, workload.micro_batch)
        for workload, problem in zip(workloads, models, strict=True)
    }
    spreads = measure(
        {str(batch): step for batch, step in steps.items()}, stopwatch_for(device), rounds=rounds
    )
    per_sample = {
        workload: spreads[str(workload.batch)].times(1 / workload.batch) for workload in workloads
    }
    smallest = per_sample[workloads[0]]
    return [
        Growth(
            f"{workload.network}, micro-batch {workload.micro_batch}",
            workload.batch,
            rounds,
            per_sample[workload].median,
            per_sample[workload].over(smallest).median,
            peak_of(problem.model, steps[workload.batch], device),
        )
        for workload, problem in zip(workloads, models, strict=True)
    ]


def measure_overhead(rounds: int, device: torch.device) -> list[Overhead]:
    inputs = torch.randn(_SAMPLES, 1, device=device)
    targets = torch.zeros(_SAMPLES, dtype=torch.int64, device=device)
    steps = {
        name: make(nn.Linear(1, 2).to(device), inputs, targets, 1)
        for name, make in ((OURS, streamed_step), (PLAIN, plain_step))
    }
    spreads = measure(steps, stopwatch_for(device), rounds=rounds, calls=_CALLS, warm_up=3)
    return [
        Overhead(name, rounds, spread.median * 1e3 / _SAMPLES) for name, spread in spreads.items()
    ]


def growth_table(rows: Sequence[Growth]) -> str:
    return format_table(
        ("case", "batch", "ms per sample", "over the smallest batch's", "device peak"),
        [
            (
                row.case,
                str(row.batch),
                f"{row.ms_per_sample:.4f}",
                f"{row.ratio_to_smallest:.3f}",
                format_bytes(row.device_bytes),
            )
            for row in rows
        ],
    )


def overhead_table(rows: Sequence[Overhead]) -> str:
    return format_table(
        ("contender", "us per micro-batch"),
        [(row.contender, f"{row.us_per_micro_batch:.1f}") for row in rows],
    )


def write(path: Path, rows: Sequence[Growth] | Sequence[Overhead]) -> None:
    with path.open("w", newline="") as file:
        names = [field.name for field in fields(rows[0])]
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            values = asdict(row).items()
            writer.writerow({name: f"{v:.6g}" if isinstance(v, float) else v for name, v in values})
