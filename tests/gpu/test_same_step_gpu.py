"""Exact batch norm, per-sample dropout and joint losses on a CUDA device."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import tolerances
import torch
from reference.full_batch import assert_gradients_match, full_batch, gradients_of
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from sbp_fast import StreamedAccumulator
from sbp_fast.memory import device_budget
from sbp_fast.ops import availability

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

SAMPLES = 13
TOLERANCE = tolerances.STEP[torch.float64]


@pytest.fixture(autouse=True)
def _needs_greenlet() -> None:
    # Nothing can be installed on a machine without network.
    pytest.importorskip("greenlet")


@pytest.fixture(params=["cuda", "triton", "reference"])
def backend(request: pytest.FixtureRequest) -> str:
    usable, reason = availability(request.param)
    if not usable:
        pytest.skip(f"backend {request.param}: {reason}")
    return str(request.param)


@pytest.fixture(params=["stays", "goes"])
def _waiting(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What waits stays on the device, or goes to host memory."""
    if request.param == "goes":
        monkeypatch.setattr("sbp_fast.accumulator.free_bytes", lambda device: 0)
    else:
        assert device_budget.free_bytes(torch.device("cuda")) > 0
    return


class Net(nn.Module):
    def __init__(self, use_checkpoint: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.blocks = nn.ModuleList(
            nn.Sequential(
                *(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)),
                *(nn.ReLU(inplace=True), nn.Dropout(dropout)),
                *(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)),
            )
            for _ in range(3)
        )
        self.head = nn.Linear(8, 5)
        self.use_checkpoint = use_checkpoint

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu_(self.stem(x))
        for block in self.blocks:
            y = checkpoint(block, x, use_reentrant=False) if self.use_checkpoint else block(x)
            x = functional.relu_(y + x)
        return self.head(x.mean((2, 3)))


def make(**options: Any) -> tuple[nn.Module, Tensor, Tensor]:
    return (
        Net(**options).double(),
        torch.randn(SAMPLES, 3, 6, 6).double(),
        torch.randint(0, 5, (SAMPLES,)),
    )


def accumulate(
    model: nn.Module, inputs: Tensor, targets: Tensor, size: int, **options: Any
) -> dict[str, Tensor | None]:
    model = copy.deepcopy(model).cuda()
    accumulator = StreamedAccumulator(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        options.pop("loss_fn", nn.CrossEntropyLoss()),
        micro_batch_size=size,
        **options,
    )
    torch.manual_seed(7)
    accumulator.backward(inputs, targets)
    return gradients_of(model)


@pytest.mark.usefixtures("_waiting")
@pytest.mark.parametrize("size", [1, 5])
@pytest.mark.parametrize("use_checkpoint", [False, True], ids=["plain", "checkpoint"])
def test_exact_batch_norm(backend: str, size: int, use_checkpoint: bool) -> None:
    model, inputs, targets = make(use_checkpoint=use_checkpoint)
    expected = full_batch(model, nn.CrossEntropyLoss(), inputs, targets).gradients
    found = accumulate(model, inputs, targets, size, backend=backend)
    assert_gradients_match(found, expected, TOLERANCE)


@pytest.mark.usefixtures("_waiting")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_exact_batch_norm_in_float32(layout: torch.memory_format, autocast: Any) -> None:
    model, inputs, targets = make()
    model = model.float().to(memory_format=layout)
    inputs = inputs.float().to(memory_format=layout)
    whole = accumulate(model, inputs, targets, SAMPLES, autocast=autocast)
    found = accumulate(model, inputs, targets, 5, autocast=autocast)
    reference = {name: value.double().cpu() for name, value in whole.items() if value is not None}
    tolerance = tolerances.STEP[autocast or torch.float32]
    assert_gradients_match(found, reference, tolerance)


def test_masks_are_those_of_the_cpu(backend: str) -> None:
    model, inputs, targets = make(dropout=0.3)
    torch.manual_seed(7)
    on_cpu = copy.deepcopy(model)
    StreamedAccumulator(
        on_cpu,
        torch.optim.SGD(on_cpu.parameters(), lr=0.1),
        nn.CrossEntropyLoss(),
        micro_batch_size=SAMPLES,
    ).backward(inputs, targets)
    for size in (4, SAMPLES):
        found = accumulate(model, inputs, targets, size, backend=backend)
        assert_gradients_match(found, gradients_of(on_cpu), TOLERANCE)  # type: ignore[arg-type]


def similarity(outputs: Tensor, targets: Tensor) -> Tensor:
    normalised = functional.normalize(outputs, dim=1)
    return functional.cross_entropy(normalised @ normalised.roll(1, 0).T, targets)


@pytest.mark.parametrize("batch_norm", ["exact", "frozen"])
def test_a_loss_over_all_samples(batch_norm: str) -> None:
    model, inputs, _ = make()
    if batch_norm == "frozen":
        model.eval()
    targets = torch.arange(SAMPLES)
    expected = full_batch(model, similarity, inputs, targets).gradients
    found = accumulate(model, inputs, targets, 4, loss_fn=similarity, cross_sample_loss=True)
    assert_gradients_match(found, expected, TOLERANCE)
