"""What every way through a large batch has in common: losses, and where backward passes start."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.autograd.graph import Node

from ..batches import MicroBatch, PyTree
from ..forward import Forward, Roots, backward_context
from ..gradients import FusedGradients
from ..invariance.cross_sample import Joint, detached
from ..invariance.sampling import Sampling
from ..large_batch import LargeBatch
from ..loss import Weight


@dataclass(frozen=True)
class Computation:
    """One large batch on its way through the model."""

    device: torch.device
    forward: Forward
    large_batch: LargeBatch
    sampling: Sampling
    grad_scaler: GradScaler | None
    fused: FusedGradients

    def take_share(self, micro_batch: MicroBatch) -> tuple[int, Weight]:
        """The index of its first sample in the large batch, and its share of the loss."""
        first_sample = self.large_batch.shares.samples
        return first_sample, self.large_batch.shares.take(micro_batch)

    def joint_loss(self, outputs: Sequence[PyTree], micro_batches: Sequence[MicroBatch]) -> Joint:
        """The loss of all micro-batches' outputs together, and its gradient with respect to them."""
        samples = [micro_batch.samples for micro_batch in micro_batches]
        joint = Joint(outputs, samples)
        targets = Joint([micro_batch.targets for micro_batch in micro_batches], samples)
        loss = self.forward.loss(joint.tree, detached(targets.tree))
        self.large_batch.add_loss(loss, 1.0)
        with self.collecting():
            self.run_back(self.roots(loss, 1.0))
        return joint

    def roots(self, loss: Tensor, seed: Weight) -> Roots:
        """Where a backward pass starts, and the gradient it starts with."""
        if self.grad_scaler is not None:
            loss = self.grad_scaler.scale(loss)
        return [(loss, _as_gradient(seed, loss))]

    def run_back(self, roots: Roots) -> None:
        """The backward pass from these tensors, each with its gradient."""
        tensors, gradients = zip(*roots, strict=True)
        self.fused.from_roots(tensors, self.large_batch.accumulators)
        torch.autograd.backward(tensors, gradients)

    def fuse_all(self, nodes: Iterable[Node]) -> None:
        """For graphs that run in parts, where all begin again if memory runs out."""
        self.fused.from_nodes(nodes, self.large_batch.accumulators)

    @contextmanager
    def collecting(
        self, scale: float = 1.0, left_out: frozenset[int] = frozenset()
    ) -> Iterator[None]:
        """Around a backward pass: its gradients, ``scale`` times, go to the accumulators; those of
        parameters that are left out are in already."""
        with (
            self.large_batch.accumulators.collecting(scale, left_out),
            backward_context(self.device.type),
        ):
            yield


def is_nothing(share: Weight) -> bool:
    """All targets are ignored: nothing to learn, and the mean over nothing is NaN."""
    return not isinstance(share, Tensor) and share == 0.0


def _as_gradient(seed: Weight, loss: Tensor) -> Tensor:
    """The seed as a gradient of the loss, made without a copy from the host: that would wait."""
    if isinstance(seed, Tensor):
        return seed.to(loss.dtype)
    return torch.full_like(loss, seed)
