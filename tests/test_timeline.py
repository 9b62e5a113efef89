"""The timeline of device memory."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from torch import nn

from sbp_fast import StreamedAccumulator
from sbp_fast.memory import MemoryTimeline, memory_budget

KIB = 1 << 10


def test_points_are_what_is_alive() -> None:
    with MemoryTimeline("cpu") as timeline:
        a = torch.empty(64 * KIB, dtype=torch.uint8)
        b = torch.empty(32 * KIB, dtype=torch.uint8)
        b.add_(1)
        del a
        torch.empty(KIB, dtype=torch.uint8)
    sizes = [size for _, size in timeline.points]
    assert sizes == [0, 64 * KIB, 96 * KIB, 33 * KIB, 32 * KIB]
    seconds = [at for at, _ in timeline.points]
    assert seconds == sorted(seconds)
    assert timeline.peak_bytes == 96 * KIB


def test_it_may_be_entered_again_and_counts_what_is_tracked() -> None:
    model = nn.Linear(16, 16, bias=False)
    timeline = MemoryTimeline("cpu")
    timeline.track(model.parameters())
    for _ in range(2):
        with timeline:
            model(torch.zeros(1, 16))
    sizes = [size for _, size in timeline.points]
    assert min(sizes) == sizes[0] == KIB
    assert max(sizes) == KIB + 128
    assert timeline.points[-1][0] > 0


def test_of_a_step_its_peak_is_the_step_s(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    accumulator = StreamedAccumulator(model, optimizer, nn.CrossEntropyLoss(), micro_batch_size=4)
    inputs, targets = torch.randn(16, 8), torch.randint(3, (16,))
    with MemoryTimeline("cpu") as timeline:
        result = accumulator.step(inputs, targets)
    assert timeline.peak_bytes == result.peak_bytes
    timeline.save_csv(tmp_path / "memory.csv")
    with (tmp_path / "memory.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["bytes"]) for row in rows] == [size for _, size in timeline.points]
    pytest.importorskip("matplotlib")
    timeline.save_plot(tmp_path / "memory.png", budget=64 * KIB)
    assert (tmp_path / "memory.png").stat().st_size > 5_000


def test_inside_of_a_budget() -> None:
    with memory_budget("cpu", 100 * KIB), MemoryTimeline("cpu") as timeline:
        torch.empty(64 * KIB, dtype=torch.uint8)
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(101 * KIB, dtype=torch.uint8)
    assert timeline.peak_bytes == 64 * KIB


def test_what_it_cannot_do(tmp_path: Path) -> None:
    timeline = MemoryTimeline("cpu")
    with pytest.raises(ValueError, match="no points"):
        timeline.save_plot(tmp_path / "memory.png")
    with pytest.raises(RuntimeError, match="save_csv"):
        timeline.save_snapshot(tmp_path / "memory.pickle")
    with pytest.raises(ValueError, match="meta"):
        MemoryTimeline("meta")
