"""What the layer benchmarks compute on: activations of one layer, as a network has them."""

from __future__ import annotations

import torch
from torch import Tensor

# Samples, channels, height and width.
Activation = tuple[int, int, int, int]

LAYOUTS = (torch.contiguous_format, torch.channels_last)

_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def make_activation(
    shape: Activation, dtype: torch.dtype, layout: torch.memory_format, device: torch.device
) -> Tensor:
    return torch.randn(shape, device=device).to(dtype=dtype, memory_format=layout)


def describe(x: Tensor) -> str:
    layout = "" if x.is_contiguous() else ", channels last"
    return f"{_NAMES[x.dtype]}, {' x '.join(map(str, x.shape))}{layout}"
