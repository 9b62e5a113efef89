"""A plan for CUDA, made without it, against what its allocator counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tolerances
import torch
from torch import Tensor, nn
from zoo.convolutional import UNet

from sbp_fast import StreamedAccumulator
from sbp_fast.bench.models import resnet50
from sbp_fast.planning import predict_peak

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

BATCH = 96
Problem = tuple[nn.Module, nn.Module, Tensor, Tensor]


def convolutional() -> Problem:
    inputs, targets = torch.randn(BATCH, 3, 128, 128), torch.randint(10, (BATCH,))
    return resnet50(64, 10), nn.CrossEntropyLoss(), inputs, targets


def u_net() -> Problem:
    inputs, targets = torch.randn(BATCH, 3, 128, 128), torch.randint(5, (BATCH, 128, 128))
    return UNet(32), nn.CrossEntropyLoss(), inputs, targets


def transformer(length: int, patch: int | None) -> Problem:
    width = 512
    layer = nn.TransformerEncoderLayer(
        width, 8, 4 * width, dropout=0.0, batch_first=True, norm_first=True
    )
    first: nn.Module = nn.Embedding(1000, width)
    inputs = torch.randint(1000, (BATCH, length))
    if patch is not None:
        first = nn.Sequential(nn.Conv2d(3, width, patch, patch), nn.Flatten(2), Transpose())
        inputs = torch.randn(BATCH, 3, 128, 128)
    model = nn.Sequential(
        first,
        nn.TransformerEncoder(layer, 6, enable_nested_tensor=False),
        Transpose(),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(width, 10),
    )
    return model, nn.CrossEntropyLoss(), inputs, torch.randint(10, (BATCH,))


def gpt() -> Problem:
    return transformer(128, None)


def vit() -> Problem:
    return transformer(64, 16)


class Transpose(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


@pytest.mark.parametrize("micro_batch_size", [8, 32])
@pytest.mark.parametrize("options", [{}, {"autocast": torch.bfloat16}], ids=str)
@pytest.mark.parametrize("make", [convolutional, u_net, vit, gpt])
def test_the_peak_is_that_of_the_allocator(
    make: Callable[[], Problem],
    options: dict[str, Any],
    micro_batch_size: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, loss_fn, inputs, targets = make()
    if any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        # Nothing can be installed on a machine without network.
        pytest.importorskip("greenlet")
    # What waits goes to the host, as it does where the device has no room.
    monkeypatch.setattr("sbp_fast.accumulator.free_bytes", lambda device: 0)
    peaks = predict_peak(
        model,
        loss_fn,
        (inputs[:1], targets[:1]),
        batch_size=BATCH,
        device=torch.device("cuda"),
        optimizer=torch.optim.AdamW,
        policy="keep",
        **options,
    )
    planned = peaks.measure(micro_batch_size).device_bytes

    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    model.cuda()
    accumulator = StreamedAccumulator(
        model,
        torch.optim.AdamW(model.parameters()),
        loss_fn,
        micro_batch_size=micro_batch_size,
        probe=False,
        **options,
    )
    accumulator.step(inputs, targets)
    torch.cuda.reset_peak_memory_stats()
    accumulator.step(inputs, targets)
    counted = torch.cuda.max_memory_allocated() - before
    assert planned == pytest.approx(counted, rel=tolerances.PLANNED_PEAK["cuda"])
