"""The random numbers of a run: begun from a seed, and given back to the caller as they were."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_all(seed: int, device: torch.device) -> None:
    """Seeds torch's generators of the CPU and of ``device``, NumPy's and Python's own.

    Not ``torch.manual_seed``: that would seed devices as well that are not concerned.
    """
    for generator in _generators(device):
        generator.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def drawn(device: torch.device) -> bytes:
    """What differs once anything has drawn from torch's generators."""
    return b"".join(generator.get_state().numpy().tobytes() for generator in _generators(device))


@contextmanager
def given_back(device: torch.device) -> Iterator[None]:
    """When left, all generators are as they were."""
    generators = _generators(device)
    states = [generator.get_state() for generator in generators]
    numpy_state, python_state = np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
        np.random.set_state(numpy_state)
        random.setstate(python_state)


def _generators(device: torch.device) -> list[torch.Generator]:
    generators = [torch.default_generator]
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        generators.append(torch.cuda.default_generators[index])
    return generators
