"""Torch's own generators of random numbers."""

from __future__ import annotations

from collections.abc import Iterable

import torch


def default_generators(devices: Iterable[torch.device]) -> list[torch.Generator]:
    """Those that functions without ``generator=`` use on the CPU and on these devices."""
    generators = [torch.default_generator]
    for device in devices:
        if device.type == "cuda":
            index = torch.cuda.current_device() if device.index is None else device.index
            generators.append(torch.cuda.default_generators[index])
    return generators
