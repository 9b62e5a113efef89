"""What is known of a large batch while it streams, and what is reported of it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from .gradients import Accumulators
from .loss import Shares, Weight
from .memory.host_store import HostStore
from .memory.peak import PeakMeter
from .result import StepResult


@dataclass
class LargeBatch:
    """The sums of one large batch: gradients, loss, weights.

    ``loss`` and ``grad_norm`` are final after :meth:`close`.
    """

    shares: Shares
    accumulators: Accumulators
    meter: PeakMeter
    activations: str
    micro_batches: int = 0
    micro_batch_size: int = 0
    host_bytes: int = 0
    spilled_bytes: int = 0
    loss: Tensor = field(init=False)
    grad_norm: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.loss = torch.zeros_like(self.accumulators.statistics[0])

    def add_loss(self, loss: Tensor, share: Weight) -> Tensor:
        """Adds a micro-batch's loss; returns it, as zero where its share on the device is zero."""
        if isinstance(share, Tensor):
            loss = loss.masked_fill(share <= 0, 0.0)
        self.loss = self.loss + loss.detach().double() * share
        return loss

    def count(self, samples: int) -> None:
        """As many have been computed at once."""
        self.micro_batches += 1
        self.micro_batch_size = max(self.micro_batch_size, samples)

    def note_waiting(self, store: HostStore) -> None:
        """What waited there at most."""
        self.host_bytes = store.peak_host_bytes
        self.spilled_bytes = store.peak_file_bytes

    def close(self, grad_scaler: GradScaler | None) -> Weight:
        """Normalises what was summed; returns what the accumulators are still to be multiplied with."""
        scale = self.shares.remaining_scale()
        self.loss = self.loss * scale
        self.grad_norm = self.accumulators.statistics[1].sqrt() * scale
        if grad_scaler is not None:
            # The scaler's factor, without reading it back to the host: what it makes of a one.
            self.grad_norm = self.grad_norm / grad_scaler.scale(torch.ones_like(self.grad_norm))
        return scale

    def finite(self) -> tuple[bool, bool]:
        """Whether the loss is finite, and whether every gradient is. Waits for the device, once."""
        loss, gradient = torch.stack(
            [torch.isfinite(self.loss), self.accumulators.statistics[2] == 0.0]
        ).tolist()
        return loss, gradient

    def result(self, skipped: bool) -> StepResult:
        return StepResult(
            loss=self.loss,
            grad_norm=self.grad_norm,
            samples=self.shares.samples,
            micro_batches=self.micro_batches,
            micro_batch_size=self.micro_batch_size,
            activations=self.activations,
            peak_bytes=self.meter.peak_bytes(),
            reserved_bytes=self.meter.reserved_bytes(),
            host_bytes=self.host_bytes,
            spilled_bytes=self.spilled_bytes,
            noise_scale=None,
            skipped=skipped,
        )
