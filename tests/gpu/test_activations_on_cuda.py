"""``activations="recompute"`` and ``"offload"`` on CUDA: gradients, memory, streams, no waiting."""

from __future__ import annotations

from typing import Any

import pytest
import tolerances
import torch
from reference.full_batch import assert_gradients_match, full_batch, gradients_of
from torch import Tensor, nn

from sbp_fast import StreamedAccumulator
from sbp_fast.activations import offload
from sbp_fast.activations.offload import Lane

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

WAYS = pytest.mark.parametrize("activations", ["recompute", "offload"])
ROWS, WIDTH, LAYERS = 256, 256, 12
# About a fortieth of a second: longer than all the rest of a micro-batch.
LATE_CYCLES = 50_000_000


class Block(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            *(nn.Linear(width, width), nn.LayerNorm(width), nn.Sigmoid(), nn.Dropout(dropout)),
            *(nn.Linear(width, width), nn.ReLU(inplace=True)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


def deep(dropout: float = 0.0, width: int = WIDTH) -> nn.Module:
    return nn.Sequential(*(Block(width, dropout) for _ in range(LAYERS))).double()


def batch(width: int = WIDTH) -> tuple[Tensor, Tensor]:
    rows = 3 * ROWS + 11
    return torch.randn(rows, width).double(), torch.randn(rows, width).double()


def accumulator_for(model: nn.Module, **options: Any) -> StreamedAccumulator:
    return StreamedAccumulator(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        nn.MSELoss(),
        micro_batch_size=ROWS,
        **options,
    )


@WAYS
def test_against_the_whole_batch(activations: str) -> None:
    model, (inputs, targets) = deep(), batch()
    oracle = full_batch(model, nn.MSELoss(), inputs, targets)
    accumulator = accumulator_for(model.cuda(), activations=activations)
    for _ in range(3):
        result = accumulator.backward(inputs, targets)
        assert_gradients_match(
            gradients_of(model), oracle.gradients, tolerances.STEP[torch.float64]
        )
    assert (result.host_bytes > 0) == (activations == "offload")


@WAYS
@pytest.mark.parametrize("dropout", ["per_sample", "native"])
def test_dropout(activations: str, dropout: str) -> None:
    model, (inputs, targets) = deep(dropout=0.3).cuda(), batch()
    gradients = []
    for choice in ("keep", activations):
        torch.manual_seed(3)
        accumulator_for(model, activations=choice, dropout=dropout).backward(inputs, targets)
        gradients.append(gradients_of(model))
    expected = {name: g.double().cpu() for name, g in gradients[0].items() if g is not None}
    assert_gradients_match(gradients[1], expected, tolerances.STEP[torch.float64])


@pytest.mark.parametrize("late", ["to the host", "to the device", "both"])
def test_copies_that_arrive_late(late: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who does not wait for them computes with what was there, or frees what is still written to."""
    copy = Lane.copy

    def copy_late(lane: Lane, target: Tensor, source: Tensor) -> torch.cuda.Event:
        to_device = target.is_cuda
        if late == "both" or to_device == (late == "to the device"):
            with torch.cuda.stream(lane._side):
                torch.cuda._sleep(LATE_CYCLES // 10)
        return copy(lane, target, source)

    monkeypatch.setattr(Lane, "copy", copy_late)
    model, (inputs, targets) = deep(), batch()
    oracle = full_batch(model, nn.MSELoss(), inputs, targets)
    accumulator_for(model.cuda(), activations="offload").backward(inputs, targets)
    assert_gradients_match(gradients_of(model), oracle.gradients, tolerances.STEP[torch.float64])


def test_a_computation_that_is_late() -> None:
    """Memory that is still being written must not be copied, nor memory that is still read be reused."""
    model, (inputs, targets) = deep(), batch()
    oracle = full_batch(model, nn.MSELoss(), inputs, targets)
    model.cuda()
    for block in model:
        block.register_forward_pre_hook(lambda *_: torch.cuda._sleep(LATE_CYCLES // 10))
    accumulator_for(model, activations="offload").backward(inputs, targets)
    assert_gradients_match(gradients_of(model), oracle.gradients, tolerances.STEP[torch.float64])


def test_on_a_stream_of_the_callers() -> None:
    model, (inputs, targets) = deep(), batch()
    oracle = full_batch(model, nn.MSELoss(), inputs, targets)
    accumulator = accumulator_for(model.cuda(), activations="offload")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(LATE_CYCLES)
        accumulator.backward(inputs, targets)
        found = gradients_of(model)
    side.synchronize()
    assert_gradients_match(found, oracle.gradients, tolerances.STEP[torch.float64])


def test_backward_never_waits() -> None:
    model, (inputs, targets) = deep().cuda(), batch()
    accumulator = accumulator_for(model, activations="offload")
    accumulator.backward(inputs, targets)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        accumulator.backward(inputs, targets)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_memory_is_pinned_once() -> None:
    model, (inputs, targets) = deep().cuda(), batch()
    accumulator = accumulator_for(model, activations="offload")
    accumulator.backward(inputs, targets)
    policy = accumulator._activations
    assert isinstance(policy, offload.Offload)
    (lane,) = policy._lanes.values()
    allocated = lane.pool.nbytes
    assert allocated > 0
    for _ in range(3):
        accumulator.backward(inputs, targets)
    # The allocator may free later than the time before; the pool has all that can wait at once.
    assert lane.pool.nbytes <= 1.25 * allocated


def test_peaks() -> None:
    inputs, targets = (tensor.float() for tensor in batch(1024))
    model = deep(width=1024).float().cuda()
    parameters = sum(parameter.nbytes for parameter in model.parameters())
    above = {}
    for activations in ("keep", "recompute", "offload"):
        accumulator = accumulator_for(model, activations=activations)
        accumulator.backward(inputs, targets)
        peak = accumulator.backward(inputs, targets).peak_bytes
        assert peak is not None
        above[activations] = peak - 2 * parameters
    assert above["recompute"] < 0.7 * above["keep"]
    assert above["offload"] < 0.7 * above["keep"]
