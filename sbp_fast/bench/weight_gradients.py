"""Weight gradients that their matrix products add, against torch's product and then an addition.

First layer by layer, forward and backward, where gradients have been accumulated before. The rule on when
it is worth while does not count here, so that the figures can tell whether it is right. Several weights
take turns, since in a step none is in the cache when its turn comes. Then whole steps against the plain
loop, as in :mod:`.step`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..gradients.weight_gradient import Linear, PointwiseConvolution, add_product
from .case import Case, Contender
from .step import OURS, PLAIN, plain_step, streamed_step
from .timing import Call

FUSED = "layer, fused"
AUTOGRAD = "layer, torch"
_PRODUCT = "product that adds"
_PRODUCT_AND_SUM = "product, addition"

_TOKENS = 64
_LARGE_BYTES = 64 << 20


@dataclass(frozen=True)
class LayerSize:
    """A linear layer on so many rows; or with ``pixels``, an image's side, a 1x1 convolution on so many
    samples."""

    outputs: int
    inputs: int
    rows: int
    pixels: int = 0

    @property
    def name(self) -> str:
        shape = f"{self.outputs}x{self.inputs}"
        if self.pixels:
            return f"1x1 convolution {shape}, {self.rows} samples of {self.pixels}x{self.pixels}"
        return f"linear {shape}, {self.rows} rows"


@dataclass(frozen=True)
class NetworkSize:
    """Three linear layers of a width, or with ``blocks`` as many of a transformer on 64 tokens."""

    width: int
    batch: int
    micro_batch: int
    blocks: int = 0

    @property
    def name(self) -> str:
        kind = f"transformer of {self.blocks} blocks" if self.blocks else "MLP of 3 layers"
        return f"{kind}, width {self.width}, batch {self.batch}, micro-batch {self.micro_batch}"


def cases(
    layers: Sequence[LayerSize], networks: Sequence[NetworkSize], device: torch.device
) -> list[Callable[[], Case]]:
    """All cases, yet to be made."""
    return [
        *(partial(_layer, size, device) for size in layers),
        *(partial(_step, size, device) for size in networks),
    ]


def _layer(size: LayerSize, device: torch.device) -> Case:
    torch.manual_seed(0)
    kernel = (1, 1) if size.pixels else ()
    around = (size.pixels, size.pixels) if size.pixels else ()
    x = torch.randn(size.rows, size.inputs, *around, device=device, requires_grad=True)
    # Small, so that sums over thousands of calls stay so.
    dy = torch.randn(size.rows, size.outputs, *around, device=device) * 1e-3
    count = min(16, max(2, _LARGE_BYTES // (4 * size.outputs * size.inputs)))
    contenders = [
        Contender(name, make(size, x, dy, _weights(size, kernel, count, device)), opponents)
        for name, make, opponents in (
            (FUSED, _fused, {AUTOGRAD: "time"}),
            (AUTOGRAD, _autograd, {}),
            (_PRODUCT, _product, {_PRODUCT_AND_SUM: "time"}),
            (_PRODUCT_AND_SUM, _product_and_sum, {}),
        )
    ]
    return Case(
        benchmark="weight gradients",
        name=size.name,
        dtype=torch.float32,
        tensors=count,
        elements=count * size.outputs * size.inputs,
        bytes=0,
        contenders=contenders,
    )


def _weights(
    size: LayerSize, kernel: tuple[int, ...], count: int, device: torch.device
) -> list[Tensor]:
    weights = [
        torch.randn(size.outputs, size.inputs, *kernel, device=device, requires_grad=True)
        for _ in range(count)
    ]
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    return weights


def _fused(size: LayerSize, x: Tensor, dy: Tensor, weights: list[Tensor]) -> Call:
    layer: Any = PointwiseConvolution if size.pixels else Linear

    def receive(weight: Tensor, left: Tensor, right: Tensor) -> None:
        assert weight.grad is not None
        add_product(weight.grad.view(len(weight), -1), left, right, 1.0, first_write=False)

    def call(_: int) -> None:
        outputs = [layer.apply(x, weight, None, x.dtype) for weight in weights]
        for output, weight in zip(outputs, weights, strict=True):
            output.grad_fn.receive = partial(receive, weight)
        _run_back(outputs, x, dy)

    return call


def _autograd(size: LayerSize, x: Tensor, dy: Tensor, weights: list[Tensor]) -> Call:
    layer = functional.conv2d if size.pixels else functional.linear
    return lambda _: _run_back([layer(x, weight) for weight in weights], x, dy)


def _run_back(outputs: list[Tensor], x: Tensor, dy: Tensor) -> None:
    torch.autograd.backward(outputs, [dy] * len(outputs))
    x.grad = None


def _product(size: LayerSize, x: Tensor, dy: Tensor, weights: list[Tensor]) -> Call:
    left, right, totals = _matrices(x, dy, weights)

    def call(_: int) -> None:
        for total in totals:
            total.addmm_(left, right)

    return call


def _product_and_sum(size: LayerSize, x: Tensor, dy: Tensor, weights: list[Tensor]) -> Call:
    left, right, totals = _matrices(x, dy, weights)

    def call(_: int) -> None:
        for total in totals:
            total.add_(left @ right)

    return call


def _matrices(x: Tensor, dy: Tensor, weights: list[Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
    left, right = (tensor.detach().movedim(1, -1).flatten(0, -2) for tensor in (dy, x))
    totals = [weight.grad.view(len(weight), -1) for weight in weights if weight.grad is not None]
    return left.t(), right, totals


def _step(size: NetworkSize, device: torch.device) -> Case:
    torch.manual_seed(0)
    model = (_transformer(size) if size.blocks else _mlp(size.width)).to(device)
    tokens = (_TOKENS,) if size.blocks else ()
    inputs = torch.randn(size.batch, *tokens, size.width, device=device)
    targets = torch.randint(0, 10, (size.batch,), device=device)
    parameters = list(model.parameters())
    return Case(
        benchmark="weight gradients, step",
        name=size.name,
        dtype=torch.float32,
        tensors=len(parameters),
        elements=sum(parameter.numel() for parameter in parameters),
        bytes=0,
        contenders=[
            Contender(
                OURS,
                streamed_step(copy.deepcopy(model), inputs, targets, size.micro_batch),
                {PLAIN: "time"},
            ),
            Contender(PLAIN, plain_step(model, inputs, targets, size.micro_batch)),
        ],
    )


def _mlp(width: int) -> nn.Module:
    return nn.Sequential(
        *(layer for _ in range(3) for layer in (nn.Linear(width, width), nn.ReLU())),
        nn.Linear(width, 10),
    )


def _transformer(size: NetworkSize) -> nn.Module:
    block = nn.TransformerEncoderLayer(
        size.width, max(1, size.width // 64), 4 * size.width, dropout=0.0, batch_first=True
    )
    return nn.Sequential(
        nn.TransformerEncoder(block, size.blocks, enable_nested_tensor=False),
        *(nn.AdaptiveAvgPool2d((1, None)), nn.Flatten(), nn.Linear(size.width, 10)),
    )
