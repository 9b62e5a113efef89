"""``batch_norm="exact"`` for splits and streams of any sizes, and over many steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import tolerances
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.full_batch import (
    assert_close,
    assert_gradients_match,
    buffers_of,
    full_batch,
    full_batch_trajectory,
    gradients_of,
    parameters_of,
)
from reference.running_statistics import assert_buffers_match
from torch import Tensor, nn
from zoo.case import CLASSES, images, labels, unsettle_batch_norm
from zoo.norm_layers import ConvNet

from sbp_fast import StreamedAccumulator

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def conv_net() -> nn.Module:
    """Smooth, and without a bias before batch norm: Adam would make steps of its rounding errors."""
    model = ConvNet(nn.BatchNorm2d)
    unsettle_batch_norm(model)
    return model


def accumulator_for(
    model: nn.Module, micro_batch_size: int, optimizer: torch.optim.Optimizer | None = None
) -> StreamedAccumulator:
    return StreamedAccumulator(
        model,
        sgd(model) if optimizer is None else optimizer,
        nn.CrossEntropyLoss(),
        micro_batch_size=micro_batch_size,
        batch_norm="exact",
    )


def stream(inputs: Tensor, targets: Tensor, sizes: list[int]) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(inputs.split(sizes), targets.split(sizes), strict=True)


class TestSplits:
    @settings(max_examples=40)
    @given(
        sizes=st.lists(st.integers(1, 6), min_size=1, max_size=6),
        micro_batch_size=st.integers(1, 8),
        streamed=st.booleans(),
        ignored=st.sets(st.integers(1, 35)),
        seed=st.integers(0, 2**16),
    )
    def test_any(
        self,
        sizes: list[int],
        micro_batch_size: int,
        streamed: bool,
        ignored: set[int],
        seed: int,
    ) -> None:
        torch.manual_seed(seed)
        samples = sum(sizes)
        model = conv_net().double()
        inputs = torch.randn(samples, 3, 8, 8).double() + torch.randn(samples, 1, 1, 1)
        targets = torch.randint(CLASSES, (samples,))
        for index in ignored:  # never the first, so that something counts
            targets[index : index + 1] = -100
        oracle = full_batch(model, nn.CrossEntropyLoss(), inputs, targets)
        accumulator = accumulator_for(model, micro_batch_size)
        if streamed:
            result = accumulator.backward(stream(inputs, targets, sizes))
        else:
            result = accumulator.backward(inputs, targets)
        bound = tolerances.STEP[torch.float64]
        assert_gradients_match(gradients_of(model), oracle.gradients, bound)
        assert_buffers_match(buffers_of(model), oracle.buffers, bound)
        assert_close(result.loss, oracle.loss, bound)
        assert result.samples == samples


class TestSteps:
    @pytest.mark.parametrize("make_optimizer", [sgd, adamw])
    @DTYPES
    def test_twenty(
        self, make_optimizer: Callable[[nn.Module], torch.optim.Optimizer], dtype: torch.dtype
    ) -> None:
        model = conv_net().to(dtype)
        batches = [(images(8).to(dtype), labels()) for _ in range(20)]
        oracle = full_batch_trajectory(model, make_optimizer, nn.CrossEntropyLoss(), batches)
        accumulator = accumulator_for(model, 5, make_optimizer(model))
        losses = [float(accumulator.step(inputs, targets).loss) for inputs, targets in batches]
        bound = tolerances.TRAJECTORY[dtype]
        assert losses == pytest.approx(oracle.losses, rel=bound)
        for name, value in parameters_of(model).items():
            expected = oracle.parameters[name]
            assert float((value.double() - expected).norm()) <= bound * float(expected.norm())
        assert_buffers_match(buffers_of(model), oracle.buffers, bound)

    def test_a_second_split_begins_where_the_first_ended(self) -> None:
        """One accumulator, batches of other sizes, layers frozen and set to eval mode in between."""
        model = conv_net().double()
        accumulator = accumulator_for(model, 4)
        for samples in (7, 12, 2):
            inputs = torch.randn(samples, 3, 8, 8, dtype=torch.float64)
            targets = torch.randint(CLASSES, (samples,))
            oracle = full_batch(model, nn.CrossEntropyLoss(), inputs, targets)
            accumulator.backward(inputs, targets)
            bound = tolerances.STEP[torch.float64]
            assert_gradients_match(gradients_of(model), oracle.gradients, bound)
            assert_buffers_match(buffers_of(model), oracle.buffers, bound)
            # Frozen in the second step, and normalising by its running statistics in the third.
            model.norm1.train(samples != 12)
            model.norm1.requires_grad_(samples != 7)
