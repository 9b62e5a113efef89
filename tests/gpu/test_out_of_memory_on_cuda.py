"""A step under a budget of the CUDA allocator, which really runs out of memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import tolerances
import torch
from reference.full_batch import assert_gradients_match, full_batch, gradients_of
from torch import nn

from sbp_fast import StreamedAccumulator
from sbp_fast.memory import MemoryTimeline
from sbp_fast.memory.out_of_memory import NothingSmallerError

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

SAMPLES, WIDTH = 8192, 1024
MIB = 1 << 20


def deep(norm: Callable[[int], nn.Module]) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [
        layer for _ in range(8) for layer in (nn.Linear(WIDTH, WIDTH), norm(WIDTH), nn.GELU())
    ]
    return nn.Sequential(*layers, nn.Linear(WIDTH, 10))


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(SAMPLES, WIDTH), torch.randint(10, (SAMPLES,))


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.BatchNorm1d])
@pytest.mark.parametrize("micro_batch_size", [SAMPLES, "auto"])
def test_the_step_goes_on_with_what_fits(
    norm: Callable[[int], nn.Module], micro_batch_size: int | str
) -> None:
    """Whole, the activations would take some 800 MiB."""
    inputs, targets = batch()
    model = deep(norm).double().cuda()
    oracle = full_batch(model, nn.CrossEntropyLoss(), inputs, targets)
    torch.cuda.empty_cache()
    budget = torch.cuda.memory_reserved() + 512 * MIB
    accumulator = StreamedAccumulator(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        nn.CrossEntropyLoss(),
        micro_batch_size=micro_batch_size,
        memory_budget=budget,
        probe=False,
    )
    with MemoryTimeline("cuda") as timeline:
        result = accumulator.backward(inputs.double(), targets)
    assert_gradients_match(gradients_of(model), oracle.gradients, tolerances.STEP[torch.float64])
    assert result.micro_batch_size < SAMPLES
    assert result.peak_bytes is not None
    assert result.peak_bytes <= budget
    assert timeline.peak_bytes <= budget


def test_where_nothing_fits_nothing_changes() -> None:
    inputs, targets = batch()
    model = deep(nn.LayerNorm).cuda()
    torch.cuda.empty_cache()
    accumulator = StreamedAccumulator(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        nn.CrossEntropyLoss(),
        micro_batch_size=64,
        memory_budget=torch.cuda.memory_reserved() + 4 * MIB,
        probe=False,
    )
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(NothingSmallerError, match="smallest memory_budget that would do"):
        accumulator.step(inputs, targets)
    for parameter, value in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, value)
        assert parameter.grad is None
