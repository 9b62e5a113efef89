"""Compares the buffers of batch norms with those after one step on the whole batch."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor


def buffer_errors(actual: Mapping[str, Tensor], oracle: Mapping[str, Tensor]) -> dict[str, float]:
    """The error of every buffer, by name; both must have the same ones.

    A running variance, and whatever else floats, is measured against its own norm. A running mean may
    be near zero: it is measured against the standard deviations of its channels, which are what its
    rounding errors come from. Counters and other integers count as equal (0) or not (infinity).
    """
    assert actual.keys() == oracle.keys()
    return {name: _error(name, actual, oracle) for name in oracle}


def assert_buffers_match(
    actual: Mapping[str, Tensor], oracle: Mapping[str, Tensor], tolerance: float
) -> None:
    for name, error in buffer_errors(actual, oracle).items():
        assert error <= tolerance, (
            f"{name} is {actual[name]}, after the whole batch it is {oracle[name]}: error {error:.3e}, "
            f"tolerance {tolerance:.1e}"
        )


def _error(name: str, actual: Mapping[str, Tensor], oracle: Mapping[str, Tensor]) -> float:
    value, expected = actual[name].detach().cpu(), oracle[name]
    assert value.shape == expected.shape, name
    if not expected.is_floating_point():
        return 0.0 if torch.equal(value, expected) else math.inf
    scale = expected.norm()
    if name.endswith("running_mean"):
        variance = oracle[name.removesuffix("mean") + "var"]
        scale = torch.maximum(scale, variance.sqrt().norm())
    distance = float((value.double() - expected).norm())
    return distance / float(scale) if scale else (math.inf if distance else 0.0)
