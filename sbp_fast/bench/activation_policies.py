"""What ``activations="recompute"`` and ``"offload"`` save, and cost: steps of three networks, beside the
plain loop and what torch offers for it.

The plain loop normalises each micro-batch by itself; so do all contenders.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from ..activations.blocks import find_blocks
from .case import Case, Contender
from .image_sizes import StepSize
from .memory import Memory, peak_of
from .models import UNet, resnet50
from .step import PLAIN, make_accumulator, plain_step
from .timing import Call

POLICIES = ("keep", "recompute", "offload")
CHECKPOINT = f"{PLAIN}, torch checkpoint"
SAVE_ON_CPU = f"{PLAIN}, torch save_on_cpu"
TORCHTUNE = f"{PLAIN}, torchtune OffloadActivations"

_CLASSES = 10

Problem = tuple[nn.Module, Tensor, Tensor]


def cases(sizes: Sequence[StepSize], device: torch.device, width: int) -> list[Callable[[], Case]]:
    return [
        partial(make_case, network, size, device, width) for size in sizes for network in networks()
    ]


def networks() -> list[str]:
    """Those that can be made here: the vision transformer is that of Transformers."""
    has_transformers = importlib.util.find_spec("transformers") is not None
    return ["ResNet-50", *(["ViT-S/8"] if has_transformers else []), "U-Net"]


def make_case(network: str, size: StepSize, device: torch.device, width: int) -> Case:
    problem = _problem(network, size, device, width)
    parameters = list(problem[0].parameters())
    return Case(
        benchmark="activations",
        name=size.name_of(network),
        dtype=torch.float32,
        tensors=len(parameters),
        elements=sum(parameter.numel() for parameter in parameters),
        bytes=0,
        contenders=[
            Contender(
                name,
                make(copy.deepcopy(problem[0]), *problem[1:], size.micro_batch),
                {} if name == PLAIN else {PLAIN: "time"},
            )
            for name, make in _contenders(device).items()
        ],
    )


def measure_memory(size: StepSize, device: torch.device, width: int) -> list[Memory]:
    """The peaks of a second step, when all that is kept between steps is there."""
    rows = []
    for network in networks():
        figures = {}
        for name, make in _contenders(device).items():
            model, inputs, targets = _problem(network, size, device, width)
            step = make(model, inputs, targets, size.micro_batch)
            figures[name] = peak_of(model, step, device), getattr(step(2), "host_bytes", 0)
        plain = figures[PLAIN][0]
        rows += [
            Memory(size.name_of(network), name, peak, peak / plain, waiting)
            for name, (peak, waiting) in figures.items()
        ]
    return rows


def _ours(policy: str, model: nn.Module, inputs: Tensor, targets: Tensor, micro_batch: int) -> Call:
    accumulator = make_accumulator(model, micro_batch, "micro_batch", policy)
    return lambda _: accumulator.step(inputs, targets)


def _checkpointed(model: nn.Module, inputs: Tensor, targets: Tensor, micro_batch: int) -> Call:
    for block in find_blocks(model).whole:
        vars(block)["forward"] = partial(checkpoint, block.forward, use_reentrant=False)
    return plain_step(model, inputs, targets, micro_batch)


def _saved_on_cpu(model: nn.Module, inputs: Tensor, targets: Tensor, micro_batch: int) -> Call:
    plain = plain_step(model, inputs, targets, micro_batch)

    def step(index: int) -> None:
        with save_on_cpu(pin_memory=inputs.is_cuda):
            plain(index)

    return step


def _offloaded_by_torchtune(
    model: nn.Module, inputs: Tensor, targets: Tensor, micro_batch: int
) -> Call:
    from torchtune.training import OffloadActivations

    plain = plain_step(model, inputs, targets, micro_batch)
    offload = OffloadActivations()

    def step(index: int) -> None:
        with offload:
            plain(index)

    return step


_CONTENDERS: dict[str, Callable[[nn.Module, Tensor, Tensor, int], Call]] = {
    **{f"activations={policy!r}": partial(_ours, policy) for policy in POLICIES},
    CHECKPOINT: _checkpointed,
    SAVE_ON_CPU: _saved_on_cpu,
    PLAIN: plain_step,
}


def _contenders(device: torch.device) -> dict[str, Callable[..., Call]]:
    """Torchtune's offloading is for CUDA alone."""
    if device.type == "cuda" and importlib.util.find_spec("torchtune") is not None:
        return {**_CONTENDERS, TORCHTUNE: _offloaded_by_torchtune}
    return _CONTENDERS


def _problem(network: str, size: StepSize, device: torch.device, width: int) -> Problem:
    torch.manual_seed(0)
    model = {"ResNet-50": _resnet50, "ViT-S/8": _vit, "U-Net": _unet}[network](size.pixels, width)
    inputs = torch.randn(size.batch, 3, size.pixels, size.pixels, device=device)
    per_pixel = (size.pixels, size.pixels) if network == "U-Net" else ()
    targets = torch.randint(0, _CLASSES, (size.batch, *per_pixel), device=device)
    return model.to(device), inputs, targets


def _resnet50(pixels: int, width: int) -> nn.Module:
    return resnet50(width, _CLASSES)


def _unet(pixels: int, width: int) -> nn.Module:
    return UNet(width // 2, _CLASSES)


class _Logits(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        logits: Tensor = self.model(pixel_values=pixels).logits
        return logits


def _vit(pixels: int, width: int) -> nn.Module:
    """Touvron et al. 2021, "Training data-efficient image transformers", table 1: small, here with
    patches of 8 pixels."""
    from transformers import ViTConfig, ViTForImageClassification

    options: dict[str, Any] = {
        "hidden_size": 6 * width,
        "num_hidden_layers": 12,
        "num_attention_heads": 6,
        "intermediate_size": 24 * width,
        "image_size": pixels,
        "patch_size": 8,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "num_labels": _CLASSES,
    }
    return _Logits(ViTForImageClassification(ViTConfig(**options)).train())
