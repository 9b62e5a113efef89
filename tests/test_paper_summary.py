"""Statistics against published tables; accuracy and IoU against counts by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from benchmarks.paper.data import Split
from benchmarks.paper.evaluation import accuracy, mean_iou, refresh_statistics
from benchmarks.paper.summary import student_quantile, summarise


# Abramowitz and Stegun, table 26.10, column for 95% between -t and t.
@pytest.mark.parametrize(
    ("freedom", "quantile"),
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (10, 2.228), (30, 2.042)],
)
def test_quantiles_of_student_are_the_tables(freedom: int, quantile: float) -> None:
    assert student_quantile(freedom) == pytest.approx(quantile, abs=6e-4)


def test_quantile_of_another_confidence() -> None:
    assert student_quantile(2, 0.99) == pytest.approx(9.925, abs=6e-4)


def test_summary_of_three() -> None:
    summary = summarise([88.0, 90.0, 92.0])
    assert (summary.mean, summary.deviation) == (90.0, 2.0)
    assert summary.margin == pytest.approx(4.303 * 2 / math.sqrt(3), abs=1e-3)
    assert summary.high - summary.mean == pytest.approx(summary.mean - summary.low)


def test_one_value_has_no_interval() -> None:
    summary = summarise([7.0])
    assert (summary.mean, summary.deviation, summary.margin) == (7.0, 0.0, math.inf)


def test_no_values_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        summarise([])


def test_accuracy_and_iou_by_hand() -> None:
    # Rows: the truth; columns: the guess. The third class occurs in neither.
    counts = torch.tensor([[6, 2, 0], [1, 3, 0], [0, 0, 0]])
    assert accuracy(counts) == pytest.approx(75.0)
    assert mean_iou(counts) == pytest.approx(100 * (6 / 9 + 3 / 6) / 2)


def test_running_statistics_become_those_of_the_images() -> None:
    norm = torch.nn.BatchNorm2d(1)
    norm.running_mean.fill_(1e6)
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 1, 1), norm).double()
    torch.nn.init.ones_(model[0].weight)
    torch.nn.init.zeros_(model[0].bias)
    images = np.random.default_rng(0).integers(0, 256, (600, 1, 2, 2), np.uint8)
    split = Split(images, np.zeros(600, np.int64))
    to_double = torch.nn.Module()
    to_double.forward = lambda pixels: model(pixels.double())
    to_double.model = model
    refresh_statistics(to_double, split, 500, torch.device("cpu"))
    assert float(norm.running_mean) == pytest.approx(images[:500].mean())
