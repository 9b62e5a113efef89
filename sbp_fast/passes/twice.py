"""All outputs first, without graphs; then, with the loss's gradient, each micro-batch again."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ..batches import MicroBatch, copied
from ..buffers import Buffers
from ..invariance.cross_sample import check_same_outputs, detached, roots_of
from .computation import Computation


def compute_twice(
    arriving: Iterable[MicroBatch], computation: Computation, buffers: Buffers
) -> None:
    """For a loss that compares samples. The inputs of the whole large batch stay on the device.

    Args:
        buffers: those of the modules, as they were before the step.

    Raises:
        RuntimeError: the model computed something else the second time.
    """
    forward, sampling = computation.forward, computation.sampling
    micro_batches: list[MicroBatch] = []
    first_samples, outputs = [], []
    with torch.no_grad():
        for micro_batch in arriving:
            micro_batches.append(micro_batch)
            first_sample, _ = computation.take_share(micro_batch)
            first_samples.append(first_sample)
            sampling.begin(first_sample, micro_batch.samples)
            # Copies, for models that write to their inputs.
            outputs.append(detached(forward.outputs(copied(micro_batch.inputs))))
            sampling.end()
    joint = computation.joint_loss(outputs, micro_batches)
    del outputs
    # From the same buffers through the same changes to the same end.
    buffers.put_back()
    differ = []
    for position, micro_batch in enumerate(micro_batches):
        sampling.begin(first_samples[position], micro_batch.samples)
        if position == len(micro_batches) - 1:
            computation.large_batch.accumulators.observe()
        again = forward.outputs(micro_batch.inputs)
        differ.append(joint.differ(position, again))
        roots = roots_of(again, joint.gradients(position))
        del again
        if roots:
            with computation.collecting():
                computation.run_back(roots)
        computation.large_batch.count(micro_batch.samples)
    check_same_outputs(differ)
