"""All micro-batches forward together, from batch norm to batch norm, and back together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..batches import MicroBatch
from ..invariance.batch_norm import ExactBatchNorm
from ..invariance.cross_sample import roots_of
from ..invariance.lockstep import Lockstep
from ..loss import Weight
from ..memory.host_store import HostStore
from .computation import Computation, is_nothing


def compute_together(
    arriving: Iterable[MicroBatch],
    computation: Computation,
    modules: Sequence[nn.Module],
    deliver: Callable[[Tensor, Tensor], None],
    store: HostStore,
    *,
    cross_sample_loss: bool,
    backend: str,
) -> None:
    """For batch norm over the whole large batch; a loss that compares samples needs no second pass.

    Args:
        modules: of the step.
        deliver: ``deliver(parameter, gradient)`` receives gradients.
        store: where what waits is kept.
    """
    sampling = computation.sampling
    together = ExactBatchNorm(
        modules, Lockstep(computation.device, sampling, store), store, deliver, backend
    )
    micro_batches: list[MicroBatch] = []

    def run(micro_batch: MicroBatch, first_sample: int, share: Weight) -> Any:
        sampling.begin(first_sample, micro_batch.samples)
        outputs = computation.forward.outputs(micro_batch.inputs)
        if cross_sample_loss:
            return outputs
        # One that counts for nothing in the loss counts in the statistics.
        if is_nothing(share):
            return []
        loss = computation.forward.loss(outputs, micro_batch.targets)
        # A loss in 16 bits rounds its share, as it rounds everything: the sums over the large batch
        # leave no place where the share could be applied later.
        return computation.roots(computation.large_batch.add_loss(loss, share), share)

    def begin(micro_batch: MicroBatch) -> Callable[[], Any]:
        if micro_batch.borrowed:
            store.leave_alone(micro_batch.tensors())
        computation.large_batch.count(micro_batch.samples)
        micro_batches.append(micro_batch)
        return partial(run, micro_batch, *computation.take_share(micro_batch))

    results = together.forward(map(begin, arriving))
    if cross_sample_loss:
        joint = computation.joint_loss(results, micro_batches)
        results = [
            roots_of(outputs, joint.gradients(position)) for position, outputs in enumerate(results)
        ]
    with computation.collecting():
        together.backward(results, computation.fuse_all)
    store.bring_back_all()
