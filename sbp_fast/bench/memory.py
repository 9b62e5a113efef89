"""What a step needs in memory: peaks beside times, in a table and a file of their own."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import nn

from ..memory import format_bytes, memory_budget
from ..report.table import format_table
from .timing import Call


@dataclass(frozen=True)
class Memory:
    """What one step needs, in bytes; ``device_ratio`` is over the plain loop's."""

    case: str
    contender: str
    device_bytes: int
    device_ratio: float
    host_bytes: int


def memory_table(rows: Sequence[Memory]) -> str:
    return format_table(
        ("case", "contender", "device peak", "over the plain loop's", "waits on the host"),
        [
            (
                row.case,
                row.contender,
                format_bytes(row.device_bytes),
                f"{row.device_ratio:.3f}",
                format_bytes(row.host_bytes),
            )
            for row in rows
        ],
    )


def write_memory(path: Path, rows: Sequence[Memory]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Memory)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def peak_of(model: nn.Module, step: Call, device: torch.device) -> int:
    """Bytes of device memory in a second step, when all that is kept between steps is there."""
    with memory_budget(device, None) as memory:
        memory.track(model.parameters())
        step(0)
        memory.reset_peak()
        step(1)
        return memory.peak_bytes
