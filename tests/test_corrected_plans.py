"""A plan is corrected by what a step was measured to need."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from sbp_fast import StepResult, StreamedAccumulator

SAMPLES, WIDTH = 64, 32
EXTRA = 16 * WIDTH  # elements per sample


class Deceptive(nn.Module):
    """Needs more in plans than in steps, or less."""

    def __init__(self, in_plans: int, in_steps: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 4))
        self.in_plans, self.in_steps = in_plans, in_steps

    def forward(self, x: Tensor) -> Tensor:
        elements = self.in_plans if isinstance(x, FakeTensor) else self.in_steps
        extra = x.new_zeros(len(x), elements, requires_grad=True).exp()
        outputs: Tensor = self.layers(x) + 0 * extra.sum(1, keepdim=True)
        return outputs


def batch(samples: int = SAMPLES) -> tuple[Tensor, Tensor]:
    return torch.randn(samples, WIDTH), torch.randint(0, 4, (samples,))


def steps(model: nn.Module, count: int, budget: int) -> list[StepResult]:
    accumulator = StreamedAccumulator(
        model,
        torch.optim.AdamW(model.parameters()),
        nn.CrossEntropyLoss(),
        memory_budget=budget,
        activations="keep",
    )
    return [accumulator.step(*batch()) for _ in range(count)]


def test_a_plan_that_asked_for_too_much(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="sbp_fast"):
        results = steps(Deceptive(EXTRA, 1), 5, budget=150_000)
    sizes = [result.micro_batch_size for result in results]
    # Not after the first: its optimizer had no state yet.
    assert sizes[0] == sizes[1] < sizes[2] == sizes[3] == sizes[4]
    assert all(result.peak_bytes is not None and result.peak_bytes <= 150_000 for result in results)
    assert [record for record in caplog.messages if "were predicted" in record]


def test_a_plan_that_was_right_stays() -> None:
    results = steps(Deceptive(EXTRA, EXTRA), 5, budget=150_000)
    assert len({result.micro_batch_size for result in results}) == 1


def test_a_plan_that_asked_for_too_little_shrinks() -> None:
    results = steps(Deceptive(1, EXTRA), 5, budget=150_000)
    sizes = [result.micro_batch_size for result in results]
    assert SAMPLES > sizes[0] >= sizes[1] == sizes[2] == sizes[3] == sizes[4]
    assert all(result.peak_bytes is not None and result.peak_bytes <= 150_000 for result in results)


def test_a_stream_of_several_sizes_is_no_measure() -> None:
    model = Deceptive(EXTRA, 1)
    accumulator = StreamedAccumulator(
        model,
        torch.optim.AdamW(model.parameters()),
        nn.CrossEntropyLoss(),
        memory_budget=150_000,
        activations="keep",
    )

    def stream() -> Iterator[tuple[Tensor, Tensor]]:
        yield batch(SAMPLES)
        yield batch(SAMPLES // 2)

    sizes = [accumulator.step(stream()).micro_batch_size for _ in range(4)]
    assert len(set(sizes)) == 1
