"""What the step benchmarks train: five networks, each with a random large batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .attention_models import GPT, ViT
from .models import resnet18, resnet50

CLASSES = 10
_PIXELS, _LENGTH, _VOCABULARY = 64, 128, 1024
_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Workload:
    """A network, its parameters' dtype, samples in the large batch and in a micro-batch."""

    network: str
    dtype: torch.dtype
    batch: int
    micro_batch: int

    @property
    def name(self) -> str:
        return (
            f"{self.network} {_DTYPES[self.dtype]}, batch {self.batch}, micro-batch "
            f"{self.micro_batch}"
        )


class Problem(NamedTuple):
    """A model, inputs and targets: for :class:`torch.nn.CrossEntropyLoss`."""

    model: nn.Module
    inputs: Tensor
    targets: Tensor


def make_problem(workload: Workload, device: torch.device, width: int) -> Problem:
    """The same at every call.

    Args:
        width: a scale; 64 is a network's own.
    """
    torch.manual_seed(0)
    problem = NETWORKS[workload.network](workload.batch, width)
    inputs = problem.inputs.to(device)
    return Problem(
        problem.model.to(device, workload.dtype),
        inputs.to(workload.dtype) if inputs.is_floating_point() else inputs,
        problem.targets.to(device),
    )


def _of_images(model: nn.Module, batch: int) -> Problem:
    return Problem(
        model, torch.randn(batch, 3, _PIXELS, _PIXELS), torch.randint(0, CLASSES, (batch,))
    )


def _gpt(batch: int, width: int) -> Problem:
    tokens = torch.randint(0, _VOCABULARY, (batch, _LENGTH + 1))
    model = GPT(4 * width, length=_LENGTH, vocabulary=_VOCABULARY)
    return Problem(model, tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())


def _mlp(batch: int, width: int) -> Problem:
    model = nn.Sequential(
        *(nn.Linear(16 * width, 64 * width), nn.ReLU()),
        *(nn.Linear(64 * width, 64 * width), nn.ReLU()),
        nn.Linear(64 * width, CLASSES),
    )
    return Problem(model, torch.randn(batch, 16 * width), torch.randint(0, CLASSES, (batch,)))


NETWORKS: dict[str, Callable[[int, int], Problem]] = {
    "ResNet-18": lambda batch, width: _of_images(resnet18(width, CLASSES), batch),
    "ResNet-50": lambda batch, width: _of_images(resnet50(width, CLASSES), batch),
    "ViT": lambda batch, width: _of_images(ViT(6 * width, pixels=_PIXELS), batch),
    "GPT": _gpt,
    "MLP": _mlp,
}
