"""What a step needs at its peak: read off one step, and drawn on to steps of other sizes."""

from __future__ import annotations

from dataclasses import astuple, dataclass


@dataclass(frozen=True)
class Peak:
    """What a step needs at most, in bytes of device memory; its parts add up to :attr:`device_bytes`.

    Attributes:
        parameters: parameters and buffers, with the copies by which a step is undone.
        gradients: the accumulators, as far as the peak has room for them: with one micro-batch it may be
            in the forward pass, when there are none.
        optimizer: its state.
        activations: what the forward pass of a micro-batch adds at its own peak, inputs included.
        transient: the rest: what the backward pass or the update needs beyond that.
        host_bytes: host memory in which activations wait for the other micro-batches.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    transient: int
    host_bytes: int

    @property
    def device_bytes(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.activations + self.transient


@dataclass(frozen=True)
class Reading:
    """What was counted in a step, in bytes. Every figure is near linear in the micro-batch size, and in
    the number of micro-batches from the third one on; their maximum is not.

    Attributes:
        parameters: live between steps, without the optimizer's state.
        optimizer: its state.
        gradients: all accumulators.
        gradients_in_forward: those that are there while a forward pass runs.
        forward_peak, backward_peak, update_peak: the most that was live in each phase.
        joint_peak: the same while a loss compares all samples: it does not depend on their number here.
        host_peak: the most that waited in host memory.
    """

    parameters: float
    optimizer: float
    gradients: float
    gradients_in_forward: float
    forward_peak: float
    backward_peak: float
    update_peak: float
    joint_peak: float
    host_peak: float

    def towards(self, other: Reading, distance: float) -> Reading:
        """On the line from here (0) through the other (1)."""
        pairs = zip(astuple(self), astuple(other), strict=True)
        return Reading(*(a + distance * (b - a) for a, b in pairs))

    def peak(self) -> Peak:
        device = max(self.forward_peak, self.backward_peak, self.update_peak, self.joint_peak)
        resident = self.parameters + self.optimizer
        activations = max(self.forward_peak - resident - self.gradients_in_forward, 0)
        gradients = min(self.gradients, device - resident - activations)
        return Peak(
            parameters=round(self.parameters),
            gradients=round(gradients),
            optimizer=round(self.optimizer),
            activations=round(activations),
            transient=round(device - resident - activations - gradients),
            host_bytes=max(round(self.host_peak), 0),
        )
