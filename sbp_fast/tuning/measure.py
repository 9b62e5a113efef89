"""The gradient noise scale of a model, from one pass over some data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..accumulator import StreamedAccumulator
from ..batches import PyTree, count_samples, has_samples
from .noise_scale import NoiseScale


def measure_noise_scale(
    model: nn.Module,
    loss_fn: Callable[..., Any] | None,
    inputs: PyTree,
    targets: PyTree = None,
    *,
    batch_size: int,
    micro_batch_size: int | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    seed: int = 0,
    **options: Any,
) -> NoiseScale:
    """Splits the data, in random order, into large batches, and computes each once.

    Data come only once, because batches that had samples in common would not be independent, as the
    interval takes them to be. ``p.grad`` is None afterwards; buffers change as in training.

    Args:
        model, loss_fn, inputs, targets: as in :meth:`sbp_fast.StreamedAccumulator.step`.
        batch_size: samples in a large batch; what is left over is not used.
        micro_batch_size: None for an eighth of ``batch_size``.
        optimizer: trains meanwhile. None: the model stays as it is.
        seed: of the order.
        options: further ones of :class:`sbp_fast.StreamedAccumulator`.

    Raises:
        ValueError: there are less than two large batches or micro-batches, or the options allow no
            estimate (exact batch norm, a cross-sample loss).
    """
    samples = count_samples(inputs, targets)
    micro_batch_size = micro_batch_size or -(-batch_size // 8)
    if not micro_batch_size < batch_size <= samples // 2:
        raise ValueError(
            f"batch_size is {batch_size} with micro-batches of {micro_batch_size} and {samples} samples; "
            "it must be larger than a micro-batch, and there must be samples for two batches at least "
            "(twenty say more)"
        )
    accumulator = StreamedAccumulator(
        model,
        torch.optim.SGD(model.parameters()) if optimizer is None else optimizer,
        loss_fn,
        micro_batch_size=micro_batch_size,
        noise_scale=True,
        **options,
    )
    compute = accumulator.backward if optimizer is None else accumulator.step
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(seed))
    noise_scale = None
    for start in range(0, samples - batch_size + 1, batch_size):
        chosen = order[start : start + batch_size]
        noise_scale = compute(_rows(inputs, chosen), _rows(targets, chosen)).noise_scale
        if noise_scale is None:
            raise ValueError(
                "no noise scale can be estimated: with exact batch norm or a cross-sample loss no part "
                "of the gradient is a smaller batch's. Pass batch_norm='micro_batch', which measures "
                "training with each micro-batch's own statistics, or put batch norm into eval mode"
            )
    assert noise_scale is not None
    for parameter in model.parameters():
        parameter.grad = None
    return noise_scale


def _rows(tree: PyTree, chosen: Tensor) -> PyTree:
    def rows(leaf: Any) -> Any:
        if not has_samples(leaf):
            return leaf
        return leaf[chosen if isinstance(leaf, Tensor) else chosen.numpy()]

    return pytree.tree_map(rows, tree)
