"""The functions behind fused weight gradients by themselves: derivatives, sums in place, and the check of
products that widen."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import tolerances
import torch
from fused_layers import note_added
from reference.full_batch import assert_gradients_match, full_batch, gradients_of
from torch import Tensor, nn
from torch.nn import functional

from sbp_fast import StreamedAccumulator
from sbp_fast.gradients import fused, weight_gradient
from sbp_fast.gradients.weight_gradient import (
    Linear,
    PointwiseConvolution,
    add_product,
    can_add,
    widens_correctly,
)

CPU = torch.device("cpu")
ROWS, INPUTS, OUTPUTS = 7, 5, 3
LAYERS = pytest.mark.parametrize(
    ("function", "native", "pixels"),
    [
        (Linear.apply, functional.linear, None),
        (PointwiseConvolution.apply, functional.conv1d, (2,)),
        (PointwiseConvolution.apply, functional.conv2d, (2, 3)),
    ],
    ids=["linear", "conv1d", "conv2d"],
)


def arguments(pixels: tuple[int, ...] | None, *, bias: bool = True) -> list[Tensor | None]:
    inputs = torch.randn(ROWS, INPUTS, *(pixels or ()), dtype=torch.float64)
    weight = torch.randn(OUTPUTS, INPUTS, *(1 for _ in pixels or ()), dtype=torch.float64)
    offset = torch.randn(OUTPUTS, dtype=torch.float64) if bias else None
    return [None if t is None else t.requires_grad_() for t in (inputs, weight, offset)]


@LAYERS
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("needed", [(True, True), (True, False), (False, True)])
def test_derivatives(
    function: Any, native: Any, pixels: Any, bias: bool, needed: tuple[bool, bool]
) -> None:
    """First and second, and for each set of arguments that ask for one."""
    given = arguments(pixels, bias=bias)
    for tensor, needs in zip(given, needed, strict=False):
        assert tensor is not None
        tensor.requires_grad_(needs)

    def ours(*tensors: Tensor | None) -> Tensor:
        output: Tensor = function(*tensors, torch.float64)
        return output

    assert torch.equal(ours(*given), native(*given))
    assert torch.autograd.gradcheck(ours, given)
    assert torch.autograd.gradgradcheck(ours, given)


@LAYERS
def test_a_receiver_takes_the_place_of_the_gradient(
    function: Any, native: Any, pixels: Any
) -> None:
    given = arguments(pixels)
    output = function(*given, torch.float64)
    received: list[Any] = []
    output.grad_fn.receive = lambda *matrices: received.append(matrices)
    gradient = torch.randn_like(output)
    output.backward(gradient)
    inputs, weight, bias = given
    assert inputs is not None
    assert weight is not None
    assert bias is not None
    assert weight.grad is None
    expected = torch.autograd.grad(native(*given), given, gradient)
    assert torch.allclose(inputs.grad, expected[0], rtol=1e-13)
    assert torch.allclose(bias.grad, expected[2], rtol=1e-13)
    before = torch.randn(OUTPUTS, INPUTS, dtype=torch.float64)
    for first_write in (True, False):
        total = torch.full_like(before, torch.nan) if first_write else before.clone()
        ((left, right),) = received
        add_product(total, left, right, 0.5, first_write=first_write)
        wanted = 0.5 * expected[1].flatten(1) + (0.0 if first_write else before)
        assert torch.allclose(total, wanted, rtol=1e-13, atol=1e-13)


@LAYERS
def test_a_receiver_is_not_asked_when_sums_would_need_a_graph(
    function: Any, native: Any, pixels: Any
) -> None:
    given = arguments(pixels)
    output = function(*given, torch.float64)
    output.grad_fn.receive = None.__class__  # fails when called
    (gradient,) = torch.autograd.grad(output.sum(), given[1], create_graph=True)
    assert gradient.requires_grad
    (expected,) = torch.autograd.grad(native(*given).sum(), given[1])
    assert torch.allclose(gradient, expected, rtol=1e-13)


def emulated(total: Tensor, left: Tensor, right: Tensor, beta: float, scale: float) -> None:
    """What the product of 16-bit matrices into sums in float32 is to compute."""
    product = scale * (left.float() @ right.float())
    total.copy_(product + beta * total if beta else product)


def rounding(total: Tensor, left: Tensor, right: Tensor, beta: float, scale: float) -> None:
    emulated(total, left, right, beta, scale)
    total.copy_(total.to(left.dtype))


def spreading_nan(total: Tensor, left: Tensor, right: Tensor, beta: float, scale: float) -> None:
    total.copy_(scale * (left.float() @ right.float()) + beta * total)


def storing(total: Tensor, left: Tensor, right: Tensor, beta: float, scale: float) -> None:
    emulated(total, left, right, 0.0, scale)


def refusing(*_: Any) -> None:
    raise NotImplementedError("no such kernel")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("product", "expected"),
    [
        (emulated, True), (rounding, False), (spreading_nan, False), (storing, False),
        (refusing, False),
    ],
)  # fmt: skip
def test_only_products_that_widen_are_used(
    product: Callable[..., None],
    expected: bool,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(weight_gradient, "_add_widened", product)
    random_state = torch.get_rng_state()
    assert widens_correctly.__wrapped__(CPU, dtype) is expected
    assert torch.equal(torch.get_rng_state(), random_state)


def test_what_can_be_added_on_the_cpu() -> None:
    assert can_add(CPU, torch.float32, torch.float32)
    assert can_add(CPU, torch.float64, torch.float64)
    assert not can_add(CPU, torch.bfloat16, torch.float32)
    assert not can_add(CPU, torch.float16, torch.float32)


class OnceAndTwice(nn.Module):
    """Under autocast, a weight that another call sees too must keep its graph there."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared = nn.Linear(6, 6), nn.Linear(6, 6)
        self.pixels, self.last = nn.Conv2d(6, 8, 1), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.shared(torch.tanh(self.first(x))))
        x = torch.tanh(self.shared(x) + x @ self.first.weight)
        return self.last(torch.tanh(self.pixels(x[:, :, None, None])).flatten(1))


@pytest.mark.parametrize("way", ["autocast", "weights"])
def test_16_bits_where_products_widen(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CUDA device whose torch has such products."""
    added = note_added(monkeypatch)
    monkeypatch.setattr(fused, "can_add", lambda *_: True)
    monkeypatch.setattr(weight_gradient, "_add_widened", emulated)
    model, options = OnceAndTwice(), {"autocast": torch.bfloat16}
    if way == "weights":
        model, options = model.to(torch.bfloat16), {}
    dtype = model.last.weight.dtype
    inputs, targets = torch.randn(12, 6).to(dtype), torch.randint(3, (12,))
    oracle = full_batch(copy.deepcopy(model), functional.cross_entropy, inputs, targets)
    for micro_batch_size in (1, 2):
        accumulator = StreamedAccumulator(
            model,
            torch.optim.SGD(model.parameters(), lr=0.1),
            functional.cross_entropy,
            micro_batch_size=micro_batch_size,
            **options,
        )
        accumulator.backward(inputs, targets)
        bound = tolerances.STEP[torch.bfloat16]
        assert_gradients_match(gradients_of(model), oracle.gradients, bound)
    # The convolution and the last layer; the others have several uses.
    assert added == {4: 18, 6: 18}
