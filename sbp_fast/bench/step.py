"""A whole step of :class:`sbp_fast.StreamedAccumulator` against the plain loop.

The plain loop is what one writes by hand: forward and backward of each micro-batch, its loss weighed
with its share of the samples; then the optimizer's step. Both start from the same parameters, have a
model and an optimizer of their own, and take turns.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ..accumulator import StreamedAccumulator
from .case import Case, Contender
from .models import resnet18
from .timing import Call

PLAIN = "plain loop"
OURS = "StreamedAccumulator.step"


@dataclass(frozen=True)
class StepSize:
    """Samples in the large batch, samples in a micro-batch, and pixels of an image's side."""

    pixels: int
    batch: int
    micro_batch: int

    @property
    def name(self) -> str:
        return (
            f"ResNet-18 fp32, {self.pixels} px, batch {self.batch}, micro-batch {self.micro_batch}"
        )


def cases(sizes: Sequence[StepSize], device: torch.device, width: int) -> list[Callable[[], Case]]:
    """One case per size, yet to be made. ``width``: channels of the first stage, 64 in ResNet-18."""
    return [partial(make_case, size, device, width) for size in sizes]


def make_case(size: StepSize, device: torch.device, width: int) -> Case:
    torch.manual_seed(0)
    model = resnet18(width).to(device)
    inputs = torch.randn(size.batch, 3, size.pixels, size.pixels, device=device)
    targets = torch.randint(0, 10, (size.batch,), device=device)
    parameters = list(model.parameters())
    return Case(
        benchmark="step",
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


def plain_step(model: nn.Module, inputs: Tensor, targets: Tensor, micro_batch: int) -> Call:
    optimizer = make_optimizer(model)
    loss_fn = nn.CrossEntropyLoss()
    samples = len(inputs)

    def step(_: int) -> None:
        for start in range(0, samples, micro_batch):
            x, y = inputs[start : start + micro_batch], targets[start : start + micro_batch]
            loss = loss_fn(model(x), y) * (len(x) / samples)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def streamed_step(model: nn.Module, inputs: Tensor, targets: Tensor, micro_batch: int) -> Call:
    accumulator = make_accumulator(model, micro_batch, "micro_batch")
    return lambda _: accumulator.step(inputs, targets)


def make_accumulator(
    model: nn.Module, micro_batch: int, batch_norm: str, activations: str = "keep"
) -> StreamedAccumulator:
    with warnings.catch_warnings():
        # "micro_batch" depends on the micro-batch, as the plain loop does.
        warnings.simplefilter("ignore", UserWarning)
        return StreamedAccumulator(
            model,
            make_optimizer(model),
            nn.CrossEntropyLoss(),
            micro_batch_size=micro_batch,
            batch_norm=batch_norm,
            activations=activations,
        )


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    # A rate at which random targets make no parameter grow.
    return torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, foreach=True)
