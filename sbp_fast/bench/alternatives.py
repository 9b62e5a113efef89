"""A step beside those of other tools that accumulate gradients, in one process and in turns.

Accelerate and Lightning Fabric divide each micro-batch's loss by the number of micro-batches, which is
right for even ones as here. Whoever is not installed is left out.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from .case import Case, Contender
from .step import OURS, PLAIN, case_of, make_optimizer, plain_step, streamed_step
from .timing import Call
from .workloads import Workload, make_problem

ACCELERATE, FABRIC = "Accelerate", "Lightning Fabric"
COMPILED = "{}, torch.compile"

# Of a model, inputs, targets, and samples in a micro-batch.
MakeStep = Callable[[nn.Module, Tensor, Tensor, int], Call]


def cases(
    workloads: Sequence[Workload], device: torch.device, width: int, *, compiled: Sequence[str] = ()
) -> list[Callable[[], Case]]:
    """One case per workload.

    Args:
        compiled: networks that are also compared under ``torch.compile``, which takes a minute each.
    """
    return [
        partial(make_case, workload, device, width, workload.network in compiled)
        for workload in workloads
    ]


def make_case(workload: Workload, device: torch.device, width: int, compiled: bool) -> Case:
    model, inputs, targets = make_problem(workload, device, width)
    micro_batch = workload.micro_batch
    rivals = contenders(compiled)
    return case_of(
        "alternatives",
        workload,
        model,
        [
            Contender(
                name,
                make(copy.deepcopy(model), inputs, targets, micro_batch),
                _opponents(name, list(rivals)),
            )
            for name, make in rivals.items()
        ],
    )


def contenders(compiled: bool) -> dict[str, MakeStep]:
    """By name; those that are installed."""
    all_of_them: dict[str, MakeStep] = {OURS: streamed_step, PLAIN: plain_step}
    if importlib.util.find_spec("accelerate") is not None:
        all_of_them[ACCELERATE] = accelerate_step
    if importlib.util.find_spec("lightning_fabric") is not None:
        all_of_them[FABRIC] = fabric_step
    if compiled:
        for name in (OURS, PLAIN):
            all_of_them[COMPILED.format(name)] = partial(_compiled, all_of_them[name])
    return all_of_them


def _opponents(name: str, names: Sequence[str]) -> dict[str, str]:
    """Ours is compared with all that compute as it does: eagerly, or compiled."""
    if name == OURS:
        return {rival: "time" for rival in (PLAIN, ACCELERATE, FABRIC) if rival in names}
    return {COMPILED.format(PLAIN): "time"} if name == COMPILED.format(OURS) else {}


def accelerate_step(model: nn.Module, inputs: Tensor, targets: Tensor, micro_batch: int) -> Call:
    from accelerate import Accelerator

    count = len(inputs) // micro_batch
    accelerator = Accelerator(gradient_accumulation_steps=count, cpu=inputs.device.type == "cpu")
    model, optimizer = accelerator.prepare(model, make_optimizer(model))
    loss_fn = nn.CrossEntropyLoss()

    def step(_: int) -> None:
        for x, y in zip(inputs.split(micro_batch), targets.split(micro_batch), strict=True):
            with accelerator.accumulate(model):
                accelerator.backward(loss_fn(model(x), y))
                optimizer.step()
                optimizer.zero_grad()

    return step


def fabric_step(model: nn.Module, inputs: Tensor, targets: Tensor, micro_batch: int) -> Call:
    from lightning_fabric import Fabric

    count = len(inputs) // micro_batch
    fabric = Fabric(accelerator=inputs.device.type, devices=1)
    wrapped, optimizer = fabric.setup(model, make_optimizer(model))
    loss_fn = nn.CrossEntropyLoss()

    def step(_: int) -> None:
        for position in range(count):
            rows = slice(position * micro_batch, (position + 1) * micro_batch)
            with fabric.no_backward_sync(wrapped, enabled=position < count - 1):
                fabric.backward(loss_fn(wrapped(inputs[rows]), targets[rows]) / count)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _compiled(
    make: MakeStep,
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    micro_batch: int,
) -> Call:
    model.compile()
    return make(model, inputs, targets, micro_batch)
