"""Fused weight gradients on a CUDA device: the same step, 16-bit products into float32, memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import tolerances
import torch
from fused_layers import Added, note_added
from reference.full_batch import assert_gradients_match, full_batch, gradients_of
from torch import Tensor, nn
from torch.nn import functional

from sbp_fast import StreamedAccumulator
from sbp_fast.gradients.weight_gradient import add_product, widens_correctly

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

DEVICE = torch.device("cuda")
SAMPLES, MICRO, WIDTH, CLASSES = 22, 4, 24, 5
NARROW = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@pytest.fixture(autouse=True)
def _full_precision() -> Iterator[None]:
    """TF32 rounds products to 10 bits; the tolerances are those of float32."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> Added:
    return note_added(monkeypatch)


def network() -> nn.Module:
    return nn.Sequential(
        *(nn.Linear(WIDTH, 31), nn.Tanh(), nn.Unflatten(1, (31, 1, 1)), nn.Conv2d(31, 16, 1)),
        *(nn.Tanh(), nn.Flatten(), nn.Linear(16, CLASSES)),
    ).to(DEVICE)


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(SAMPLES, WIDTH), torch.randint(CLASSES, (SAMPLES,))


def accumulator_for(model: nn.Module, loss_fn: Any = None, **options: Any) -> StreamedAccumulator:
    return StreamedAccumulator(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1, foreach=False),
        loss_fn or functional.cross_entropy,
        micro_batch_size=MICRO,
        **options,
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_as_the_whole_batch(dtype: torch.dtype, added: Added) -> None:
    model, (inputs, targets) = network().to(dtype), batch()
    oracle = full_batch(model, functional.cross_entropy, inputs.to(dtype), targets)
    accumulator_for(model).backward(inputs.to(dtype), targets)
    assert_gradients_match(gradients_of(model), oracle.gradients, tolerances.STEP[dtype])
    assert added == {0: 6, 2: 6, 4: 6}


@pytest.mark.parametrize("way", ["autocast", "weights"])
def test_16_bits(way: str, added: Added) -> None:
    model, (inputs, targets) = network(), batch()
    options: dict[str, Any] = {"autocast": torch.bfloat16}
    if way == "weights":
        model, inputs, options = model.bfloat16(), inputs.bfloat16(), {}
    oracle = full_batch(model, functional.cross_entropy, inputs, targets)
    accumulator_for(model, **options).backward(inputs, targets)
    bound = tolerances.STEP[torch.bfloat16]
    assert_gradients_match(gradients_of(model), oracle.gradients, bound)
    expected = {0: 6, 2: 6, 4: 6} if widens_correctly(DEVICE, torch.bfloat16) else {}
    assert added == expected


@NARROW
@pytest.mark.parametrize("first_write", [False, True])
def test_products_into_float32(dtype: torch.dtype, first_write: bool) -> None:
    if not widens_correctly(DEVICE, dtype):
        pytest.skip(f"this torch has no right product of {dtype} matrices into float32 here")
    left, right = torch.randn(3000, 77).to(dtype), torch.randn(3000, 53).to(dtype)
    before = torch.full((77, 53), torch.nan) if first_write else torch.randn(77, 53)
    total = before.to(DEVICE)
    add_product(total, left.to(DEVICE).t(), right.to(DEVICE), 0.5, first_write=first_write)
    expected = 0.5 * (left.double().t() @ right.double())
    if not first_write:
        expected += before
    error = (total.double().cpu() - expected).norm() / expected.norm()
    assert float(error) < tolerances.STEP[torch.float32]


def test_no_gradient_is_alive_beside_the_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers of 16 MiB. The product's own workspace is there from the first step on."""
    width, peaks = 2048, []
    for least_bytes in (0, 1 << 40):
        note_added(monkeypatch, least_bytes=least_bytes)
        model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(4))).to(DEVICE)
        accumulator = accumulator_for(model, nn.MSELoss())
        inputs = torch.randn(SAMPLES, width)
        accumulator.step(inputs, inputs)
        peaks.append(accumulator.step(inputs, inputs).peak_bytes)
        del model, accumulator
    fused, plain = peaks
    assert plain - fused >= 0.9 * width * width * 4
