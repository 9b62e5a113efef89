"""Where a large batch's samples are in a tensor inside of the model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# The name of the module that calls, and how many calls it has made before in this forward pass.
Site = tuple[str, int]


@dataclass(frozen=True)
class Layout:
    """The samples are along one dimension, perhaps with several rows for each.

    Attributes:
        dim: that dimension; None where the tensor has no samples and is the same for all.
        in_turns: rows of different samples take turns, as in ``(time * samples, features)``; otherwise
            a sample's rows follow one another, as in ``(samples * windows, features)``.
    """

    dim: int | None
    in_turns: bool = False

    def outer_and_samples(self, shape: Sequence[int], samples: int) -> tuple[int, int] | None:
        """How to read a tensor of this shape as ``(outer, samples, inner)``; None if it cannot be."""
        if self.dim is None:
            return 1, 1
        if self.dim >= len(shape) or shape[self.dim] % samples:
            return None
        outer = math.prod(shape[: self.dim])
        if self.in_turns:
            outer *= shape[self.dim] // samples
        return outer, samples


# Of sums over many elements, on devices that add them in another order each time.
_ROUNDING = 1e-6

SAMPLES_FIRST = Layout(0)
NO_SAMPLES = Layout(None)


class Fingerprint:
    """What is left of a tensor to tell where another one differs: its sums over all but one dimension."""

    def __init__(self, tensor: Tensor) -> None:
        self.shape = tensor.shape
        values = tensor.detach().nan_to_num(0.0, 0.0, 0.0).double()
        # Weights, so that exchanged or cancelling elements do not look the same.
        noise = torch.arange(values.numel(), device=values.device).double().cos().view(values.shape)
        values = values * (2.0 + noise)
        self._sums = [
            values.sum([other for other in range(values.ndim) if other != dim]).cpu()
            if values.ndim > 1
            else values.cpu()
            for dim in range(values.ndim)
        ]

    def is_like(self, other: Fingerprint | None) -> bool:
        return other is not None and self.shape == other.shape and not any(self.changed(other))

    def changed(self, other: Fingerprint) -> list[set[int]]:
        """For every dimension the indices at which the tensors differ by more than rounding."""
        indices = []
        for mine, theirs in zip(self._sums, other._sums, strict=True):
            differs = (mine - theirs).abs() > _ROUNDING * mine.abs().max() if mine.numel() else mine
            indices.append(set(torch.nonzero(differs).flatten().tolist()))
        return indices


def recognise(
    before: Fingerprint, after: Fingerprint, samples: int, replaced: int
) -> Layout | None:
    """The layout of a tensor, from its values before and after one sample was replaced by another.

    Returns:
        None where more has changed than one sample's part could be, or the shape itself.
    """
    if before.shape != after.shape:
        return None
    changed = before.changed(after)
    if not any(changed):
        return NO_SAMPLES
    for dim, indices in enumerate(changed):
        rows, rest = divmod(before.shape[dim], samples)
        if rest or not indices:
            continue
        if indices <= set(range(replaced * rows, (replaced + 1) * rows)):
            return Layout(dim)
        if all(index % samples == replaced for index in indices):
            return Layout(dim, in_turns=True)
    return None


_DECLARED = "_sbp_fast_sample_dimension"


def declare_sample_dimension(module: nn.Module, dim: int) -> None:
    """Says along which dimension the samples are in what this module and all below it compute.

    For a model whose layout is not recognised on the first step: ``1`` for tensors of shape ``(time,
    samples, features)``. It overrules what was recognised.

    Args:
        dim: of the tensors that are given to dropout; 0 or more.

    Raises:
        ValueError: a negative dimension.
    """
    if dim < 0:
        raise ValueError(f"dim is {dim}; it must be 0 or more, counted from the first dimension")
    for child in module.modules():
        setattr(child, _DECLARED, dim)


class Layouts:
    """What is known of the tensors that calls of dropout are given.

    Attributes:
        recognised: by site; None where it was looked at in vain.
    """

    def __init__(self) -> None:
        self.recognised: dict[Site, Layout | None] = {}

    def of(self, site: Site, module: nn.Module | None, tensor: Tensor, samples: int) -> Layout:
        """The layout of ``tensor``; samples come first where nothing is known.

        Raises:
            ValueError: it is not recognised, or does not fit this tensor.
        """
        declared = getattr(module, _DECLARED, None)
        if declared is not None:
            layout: Layout | None = Layout(declared)
        elif site in self.recognised:
            layout = self.recognised[site]
        else:
            layout = self.recognised.get((site[0], 0), SAMPLES_FIRST)
        if layout is None or layout.outer_and_samples(tensor.shape, samples) is None:
            raise ValueError(
                f"dropout in {site[0]!r} is given a tensor of shape {tuple(tensor.shape)}, in which the "
                f"{samples} samples of the micro-batch are not recognised"
                + ("" if layout is None else f" along dimension {layout.dim}")
                + "; say where they are with sbp_fast.declare_sample_dimension(module, dim), or pass "
                "dropout='native'"
            )
        return layout
