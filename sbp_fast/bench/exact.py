"""What exact batch norm costs: a step of ResNet-50 against the plain loop, in time and in memory.

The plain loop normalises each micro-batch by itself. It is cheaper, and computes another gradient.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from .case import Case, Contender
from .image_sizes import StepSize
from .memory import Memory, peak_of
from .models import resnet50
from .step import PLAIN, make_accumulator, plain_step

EXACT = "batch_norm='exact'"


def cases(sizes: Sequence[StepSize], device: torch.device, width: int) -> list[Callable[[], Case]]:
    return [partial(make_case, size, device, width) for size in sizes]


def make_case(size: StepSize, device: torch.device, width: int) -> Case:
    model, inputs, targets = _problem(size, device, width)
    parameters = list(model.parameters())
    accumulator = make_accumulator(copy.deepcopy(model), size.micro_batch, "exact")
    return Case(
        benchmark="exact",
        name=size.name_of("ResNet-50"),
        dtype=torch.float32,
        tensors=len(parameters),
        elements=sum(parameter.numel() for parameter in parameters),
        bytes=0,
        contenders=[
            Contender(EXACT, lambda _: accumulator.step(inputs, targets), {PLAIN: "time"}),
            Contender(PLAIN, plain_step(model, inputs, targets, size.micro_batch)),
        ],
    )


def measure_memory(size: StepSize, device: torch.device, width: int) -> list[Memory]:
    """The peaks of a second step, when all that is kept between steps is there."""
    model, inputs, targets = _problem(size, device, width)
    plain = peak_of(model, plain_step(model, inputs, targets, size.micro_batch), device)
    model = _problem(size, device, width)[0]
    accumulator = make_accumulator(model, size.micro_batch, "exact")
    waiting = 0

    def step(_: int) -> None:
        nonlocal waiting
        waiting = accumulator.step(inputs, targets).host_bytes

    exact = peak_of(model, step, device)
    return [
        Memory(size.name_of("ResNet-50"), EXACT, exact, exact / plain, waiting),
        Memory(size.name_of("ResNet-50"), PLAIN, plain, 1.0, 0),
    ]


def _problem(size: StepSize, device: torch.device, width: int) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = resnet50(width).to(device)
    inputs = torch.randn(size.batch, 3, size.pixels, size.pixels, device=device)
    return model, inputs, torch.randint(0, 10, (size.batch,), device=device)
