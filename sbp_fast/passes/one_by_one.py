"""Each micro-batch forward and backward before the next: nothing of it is kept."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ..batches import MicroBatch
from ..streaming import Arrival
from .computation import Computation, is_nothing, run_back


def compute_one_by_one(arrivals: Iterable[Arrival], computation: Computation) -> None:
    """Runs every micro-batch with its share of the large batch."""
    for arrival in arrivals:
        if arrival.is_last:
            computation.large_batch.accumulators.observe()
        _compute(arrival.micro_batch, computation)
        # Its memory is wanted for the next one, which is sent before the loop comes round.
        del arrival


def _compute(micro_batch: MicroBatch, computation: Computation) -> None:
    forward = computation.forward
    first_sample, share = computation.take_share(micro_batch)
    if is_nothing(share):
        return
    computation.sampling.begin(first_sample, micro_batch.samples)
    loss = forward.loss(forward.outputs(micro_batch.inputs), micro_batch.targets)
    loss = computation.large_batch.add_loss(loss, share)
    # A share seeds the backward pass, so that gradients arrive ready to be kept. A loss in 16 bits
    # would round it: then it scales the gradients as they are added, in the accumulators' precision
    # (a share on the device must be read for that).
    narrow = loss.dtype in (torch.bfloat16, torch.float16)
    scale, seed = (float(share), 1.0) if narrow else (1.0, share)
    with computation.collecting(scale):
        run_back(computation.roots(loss, seed))
    computation.sampling.end()
