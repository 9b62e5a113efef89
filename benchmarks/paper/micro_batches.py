"""The largest micro-batch within a budget: the paper's ``B_max``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

import sbp_fast

# The rest is for what a plan does not see: the workspaces of libraries, and what lies between tensors.
_SHARE = 0.9
# More than any device has: all sizes are planned, and each budget finds its own.
_NO_LIMIT = 2**62


def largest_micro_batches(
    model: nn.Module,
    loss_fn: nn.Module,
    sample: tuple[Tensor, Tensor],
    optimizer: torch.optim.Optimizer,
    batch: int,
    budgets: Sequence[int],
    device: torch.device,
) -> Mapping[int, int | None]:
    """For each budget (bytes) the largest power of two of samples that fits, at most ``batch``; None
    where not one sample does.

    It is planned for plain steps: with exact batch norm, what the other micro-batches need waits in host
    memory, and more would fit, but not into plain accumulation, which is to have the same micro-batches.

    From one :func:`sbp_fast.plan`, which takes seconds for a deep network: so the same micro-batches
    serve all large batches.

    Args:
        sample: images and targets of one sample or more.
    """
    plan = sbp_fast.plan(
        model,
        loss_fn,
        sample,
        batch_size=batch,
        budget=_NO_LIMIT,
        device=device,
        optimizer=optimizer,
        batch_norm="micro_batch",
    )
    return {
        budget: max(
            (row.micro_batch_size for row in plan.rows if row.peak.device_bytes <= _SHARE * budget),
            default=None,
        )
        for budget in budgets
    }
