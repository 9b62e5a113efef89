"""``memory_budget``: a step takes no more, or says that it cannot."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference.full_batch import assert_gradients_match, full_batch, gradients_of
from torch import nn

from sbp_fast import StreamedAccumulator
from sbp_fast.memory import memory_budget
from sbp_fast.memory.out_of_memory import NothingSmallerError

EXACT = 1e-10


def accumulator_for(
    model: nn.Module, size: int, budget: Any, **options: Any
) -> StreamedAccumulator:
    """Whose micro-batches alone become smaller where memory does not suffice."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return StreamedAccumulator(
        model,
        optimizer,
        nn.CrossEntropyLoss(),
        micro_batch_size=size,
        memory_budget=budget,
        probe=False,
        **{"activations": "keep", **options},
    )


def layers_of(width: int, depth: int, kind: str) -> nn.Sequential:
    torch.manual_seed(depth)
    blocks: list[nn.Module] = []
    for _ in range(depth):
        blocks.append(nn.Linear(width, width))
        if kind == "batch_norm":
            blocks.append(nn.BatchNorm1d(width))
        elif kind == "layer_norm":
            blocks.append(nn.LayerNorm(width))
        blocks.append(nn.Dropout(0.0) if kind == "dropout" else nn.Tanh())
    return nn.Sequential(*blocks, nn.Linear(width, 3)).double()


MODELS = st.tuples(
    st.integers(2, 40),
    st.integers(1, 3),
    st.sampled_from(["plain", "layer_norm", "batch_norm", "dropout"]),
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    model=MODELS,
    samples=st.integers(2, 60),
    size=st.integers(1, 60),
    part=st.floats(0.55, 1.2),
)
def test_is_kept_by_random_models(
    model: tuple[int, int, str], samples: int, size: int, part: float
) -> None:
    inputs, targets = torch.randn(samples, model[0]).double(), torch.randint(3, (samples,))
    unbounded = layers_of(*model)
    with memory_budget("cpu", None) as memory:
        memory.track(unbounded.parameters())
        memory.track(unbounded.buffers())
        peak = accumulator_for(unbounded, samples, None).backward(inputs, targets).peak_bytes
    assert peak is not None
    budget = max(1, int(part * peak))
    network = layers_of(*model)
    oracle = full_batch(network, nn.CrossEntropyLoss(), inputs, targets)
    accumulator = accumulator_for(network, size, budget)
    try:
        result = accumulator.backward(inputs, targets)
    except torch.OutOfMemoryError as error:
        words = re.search(r"would do is (\d+) bytes .* with micro_batch_size=(\d+)", str(error))
        assert words is not None
        # What was predicted does.
        budget, size = math.ceil(1.05 * int(words[1])), int(words[2])
        again = accumulator_for(layers_of(*model), size, budget)
        if part < 0.6:
            assert again.backward(inputs, targets).samples == samples
        assert all(parameter.grad is None for parameter in network.parameters())
        return
    assert result.peak_bytes is not None
    assert result.peak_bytes <= budget
    assert_gradients_match(gradients_of(network), oracle.gradients, EXACT)


def test_steps_go_on_within_it() -> None:
    """Optimizer state comes with the first step, and counts from then on."""
    inputs, targets = torch.randn(64, 32).double(), torch.randint(3, (64,))
    model, whole = layers_of(32, 4, "layer_norm"), layers_of(32, 4, "layer_norm")
    kept = 8 * 3 * sum(parameter.numel() for parameter in model.parameters())
    accumulator = accumulator_for(model, 64, kept + (120 << 10))
    unbounded = accumulator_for(whole, 64, None)
    for _ in range(3):
        result = accumulator.step(inputs, targets)
        unbounded.step(inputs, targets)
        assert result.peak_bytes is not None
        assert result.peak_bytes <= kept + (120 << 10)
    assert result.micro_batch_size < 64
    for bounded, free in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(bounded, free, rtol=EXACT, atol=EXACT)


def test_less_than_the_parameters_is_refused() -> None:
    model = layers_of(32, 4, "plain")
    inputs, targets = torch.randn(8, 32).double(), torch.randint(3, (8,))
    message = r"memory_budget is 10\.0 KiB, but parameters, .* alone take 33\.8 KiB"
    with pytest.raises(NothingSmallerError, match=message):
        accumulator_for(model, 4, "10KiB").step(inputs, targets)


@pytest.mark.parametrize("budget", ["many", 0, -1, 1.5])
def test_no_size(budget: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        accumulator_for(layers_of(4, 1, "plain"), 4, budget)


class TestAutomaticSize:
    def test_fewest_micro_batches_that_fit_as_even_as_they_come(self) -> None:
        inputs, targets = torch.randn(100, 32).double(), torch.randint(3, (100,))
        model = layers_of(32, 4, "layer_norm")
        oracle = full_batch(model, nn.CrossEntropyLoss(), inputs, targets)
        kept = 8 * 3 * sum(parameter.numel() for parameter in model.parameters())
        accumulator = accumulator_for(model, "auto", kept + (200 << 10))
        result = accumulator.backward(inputs, targets)
        assert_gradients_match(gradients_of(model), oracle.gradients, EXACT)
        assert result.micro_batch_size == math.ceil(100 / result.micro_batches)
        assert 1 < result.micro_batches < 10
        assert result.peak_bytes is not None
        assert result.peak_bytes <= kept + (200 << 10)
        larger = accumulator_for(
            layers_of(32, 4, "layer_norm"), math.ceil(100 / (result.micro_batches - 1)), None
        )
        with memory_budget("cpu", None) as memory:
            memory.track(larger._parameters.all)
            peak = larger.step(inputs, targets).peak_bytes
        assert peak is not None
        assert peak > 0.9 * (kept + (200 << 10))

    def test_items_of_a_stream(self) -> None:
        inputs, targets = torch.randn(100, 32).double(), torch.randint(3, (100,))
        model = layers_of(32, 4, "layer_norm")
        oracle = full_batch(model, nn.CrossEntropyLoss(), inputs, targets)
        kept = 8 * 3 * sum(parameter.numel() for parameter in model.parameters())
        accumulator = accumulator_for(model, "auto", kept + (100 << 10))
        result = accumulator.backward(zip(inputs.split(50), targets.split(50), strict=True))
        assert_gradients_match(gradients_of(model), oracle.gradients, EXACT)
        assert 1 < result.micro_batch_size < 50

    def test_is_the_default_and_32_on_a_cpu_without_a_budget(self) -> None:
        model = layers_of(8, 1, "batch_norm")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        accumulator = StreamedAccumulator(model, optimizer, nn.CrossEntropyLoss())
        inputs, targets = torch.randn(70, 8).double(), torch.randint(3, (70,))
        assert accumulator.step(inputs, targets).micro_batch_size == 32
        assert accumulator.step(inputs[:20], targets[:20]).micro_batch_size == 20

    def test_a_model_that_cannot_be_planned_is_tried(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        class OfValues(nn.Linear):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return super().forward(x) * len(x[x[:, 0] > 100.0] + 1)

        model = OfValues(64, 3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        accumulator = StreamedAccumulator(
            model, optimizer, nn.CrossEntropyLoss(), memory_budget="12KiB", probe=False
        )
        with caplog.at_level("INFO", logger="sbp_fast"):
            result = accumulator.step(torch.randn(512, 64), torch.randint(3, (512,)))
        assert "not planned" in caplog.text
        assert result.micro_batch_size < 512
        assert result.peak_bytes is not None
        assert result.peak_bytes <= 12 << 10

    def test_too_small_a_budget_says_which_would_do(self) -> None:
        model = layers_of(32, 4, "layer_norm")
        inputs, targets = torch.randn(8, 32).double(), torch.randint(3, (8,))
        with pytest.raises(ValueError, match="the least that would do is"):
            accumulator_for(model, "auto", "40KiB").step(inputs, targets)
