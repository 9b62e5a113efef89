"""A whole step of :class:`sbp_fast.StreamedAccumulator` against the plain loop.

The plain loop is what one writes by hand: forward and backward of each micro-batch, its loss weighed
with its share of the samples; then the optimizer's step. Both start from the same parameters, have a
model and an optimizer of their own, and take turns.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from ..accumulator import StreamedAccumulator
from .case import Case, Contender
from .timing import Call
from .workloads import Workload, make_problem

PLAIN = "plain loop"
OURS = "StreamedAccumulator.step"


def cases(
    workloads: Sequence[Workload], device: torch.device, width: int
) -> list[Callable[[], Case]]:
    """One case per workload, yet to be made. ``width``: see :func:`.workloads.make_problem`."""
    return [partial(make_case, workload, device, width) for workload in workloads]


def make_case(workload: Workload, device: torch.device, width: int) -> Case:
    model, inputs, targets = make_problem(workload, device, width)
    streamed = streamed_step(copy.deepcopy(model), inputs, targets, workload.micro_batch)
    plain = plain_step(model, inputs, targets, workload.micro_batch)
    return case_of(
        "step",
        workload,
        model,
        [Contender(OURS, streamed, {PLAIN: "time"}), Contender(PLAIN, plain)],
    )


def case_of(
    benchmark: str, workload: Workload, model: nn.Module, contenders: Sequence[Contender]
) -> Case:
    parameters = list(model.parameters())
    return Case(
        benchmark=benchmark,
        name=workload.name,
        dtype=workload.dtype,
        tensors=len(parameters),
        elements=sum(parameter.numel() for parameter in parameters),
        bytes=0,
        contenders=contenders,
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
