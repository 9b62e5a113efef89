"""Losses over the outputs of the whole large batch: contrastive ones, which compare samples.

The outputs of all micro-batches together are small where the activations behind them are not. So the
loss is computed on all of them at once, detached, and its gradient with respect to each micro-batch's
outputs starts that micro-batch's backward pass (Gao et al. 2021, "Scaling Deep Contrastive Learning
Batch Size under Memory Limited Setup").
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

PyTree = Any

# How far outputs may be from those of the first pass, relative to their norm: rounding in another order.
_TOLERANCE = 1e-3
_TOLERANCE_16_BIT = 3e-2


class Joint:
    """The outputs, or the targets, of all micro-batches as those of one large batch.

    Tensors whose first dimension counts a micro-batch's samples (or a multiple) are joined along it.
    Others must be the same in every micro-batch: a learned temperature, say.

    Attributes:
        tree: what the loss is given; its floating-point tensors require a gradient.

    Raises:
        ValueError: micro-batches whose outputs do not fit together.
    """

    def __init__(self, trees: Sequence[PyTree], samples: Sequence[int]) -> None:
        flat = [pytree.tree_flatten(tree) for tree in trees]
        self._specs = [spec for _, spec in flat]
        for position, spec in enumerate(self._specs):
            if spec != self._specs[0]:
                raise ValueError(
                    f"micro-batch {position} has outputs of the structure {spec}, micro-batch 0 of "
                    f"{self._specs[0]}; with cross_sample_loss=True they must be alike"
                )
        self._rows: list[list[int] | None] = []
        leaves = []
        for position, column in enumerate(zip(*(leaves for leaves, _ in flat), strict=True)):
            rows = _rows(column, samples)
            self._rows.append(rows)
            if rows is not None:
                leaves.append(torch.cat([leaf.detach() for leaf in column]))
            else:
                self._check_same(position, column)
                first = column[0]
                leaves.append(first.detach() if isinstance(first, Tensor) else first)
        self._leaves = [
            leaf.requires_grad_() if _is_differentiable(leaf) else leaf for leaf in leaves
        ]
        self.tree = pytree.tree_unflatten(self._leaves, self._specs[0])

    def _check_same(self, position: int, column: Sequence[Any]) -> None:
        if not isinstance(column[0], Tensor):
            return
        for other in column[1:]:
            if other.shape != column[0].shape or not torch.equal(other, column[0]):
                raise ValueError(
                    f"output {position} of the model, of shape {tuple(column[0].shape)}, does not have "
                    "the samples first and is not the same in all micro-batches; with "
                    "cross_sample_loss=True return tensors of shape (samples, ...)"
                )

    def gradients(self, position: int) -> list[Tensor | None]:
        """The loss's gradient with respect to one micro-batch's outputs, leaf by leaf. What all have in
        common gets it from the first."""
        gradients: list[Tensor | None] = []
        for leaf, rows in zip(self._leaves, self._rows, strict=True):
            gradient = leaf.grad if isinstance(leaf, Tensor) else None
            if gradient is not None and rows is not None:
                start = sum(rows[:position])
                gradient = gradient[start : start + rows[position]]
            gradients.append(gradient if rows is not None or position == 0 else None)
        return gradients

    def differ(self, position: int, outputs: PyTree) -> Tensor:
        """Whether a micro-batch's outputs are not those that were joined; read on the device."""
        apart = []
        for leaf, rows, again in zip(
            self._leaves, self._rows, pytree.tree_leaves(outputs), strict=True
        ):
            if _is_differentiable(leaf):
                before = leaf.detach()
                if rows is not None:
                    start = sum(rows[:position])
                    before = before[start : start + rows[position]]
                narrow = before.dtype in (torch.bfloat16, torch.float16)
                tolerance = _TOLERANCE_16_BIT if narrow else _TOLERANCE
                difference = (again.detach() - before).double().norm()
                apart.append(difference > tolerance * before.double().norm())
        return torch.stack(apart).any() if apart else torch.zeros((), dtype=torch.bool)


def roots_of(outputs: PyTree, gradients: Sequence[Tensor | None]) -> list[tuple[Tensor, Tensor]]:
    """The outputs that a graph leads to, each with its gradient."""
    return [
        (leaf, gradient)
        for leaf, gradient in zip(pytree.tree_leaves(outputs), gradients, strict=True)
        if gradient is not None and isinstance(leaf, Tensor) and leaf.requires_grad
    ]


def detached(outputs: PyTree) -> PyTree:
    """The outputs without their graphs."""
    return pytree.tree_map(
        lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, outputs
    )


def check_same_outputs(differ: Sequence[Tensor]) -> None:
    """Raises RuntimeError where the model's second pass differs from its first. Waits for the device."""
    for position, differs in enumerate(torch.stack(list(differ)).tolist()):
        if differs:
            raise RuntimeError(
                f"the model's outputs for micro-batch {position} are not the same when they are computed "
                "again; with cross_sample_loss=True every micro-batch runs twice, so the model must not "
                "change between the passes nor draw random numbers of its own (from NumPy, or from a "
                "generator)"
            )


def _rows(column: Sequence[Any], samples: Sequence[int]) -> list[int] | None:
    """How many rows each micro-batch has in a tensor of samples; None for all else."""
    if not all(isinstance(leaf, Tensor) and leaf.ndim > 0 for leaf in column):
        return None
    rows = [leaf.shape[0] for leaf in column]
    per_sample = rows[0] // samples[0]
    fits = per_sample > 0 and all(
        count == per_sample * n for count, n in zip(rows, samples, strict=True)
    )
    return rows if fits else None


def _is_differentiable(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()
