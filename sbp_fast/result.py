"""What a step reports."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class StepResult:
    """Figures of one large batch. Tensors stay on the device until they are read.

    Attributes:
        loss: the large batch's loss, as one ``loss_fn`` over all of it would give it (under
            ``"inverse_sqrt"``: divided by the square root of ``samples``); no dimensions.
        grad_norm: the 2-norm of the large batch's gradient before clipping; float64, no dimensions.
        samples: samples in the large batch.
        micro_batches: how many pieces it was split into.
        micro_batch_size: the largest number of samples in one piece.
        activations: what became of them: ``"keep"``, ``"recompute"``, ``"recompute 3 of 16 blocks"`` or
            ``"offload"``.
        peak_bytes: the most device memory allocated at once during the step, in bytes. On CUDA the
            allocator's figure (its peak is reset when a step begins). On the CPU, where nothing counts
            by itself, the figure of an enclosing :func:`sbp_fast.memory.memory_budget`, else None.
        reserved_bytes: on CUDA, the most that the allocator had from the device, in bytes: far above
            ``peak_bytes``, memory is fragmented. None elsewhere.
        host_bytes: the most host memory in which activations waited at once, in bytes: what exact batch
            norm keeps of the other micro-batches while one computes, or what ``activations="offload"``
            sends there. None of it is in ``peak_bytes``, on the CPU either. 0 where nothing waits.
        spilled_bytes: the same for what waited in files, beyond ``host_budget``.
        noise_scale: None; the gradient noise scale is not available yet.
        skipped: True where the loss or the gradient was not finite, so that no update was made.
    """

    loss: Tensor
    grad_norm: Tensor
    samples: int
    micro_batches: int
    micro_batch_size: int
    activations: str
    peak_bytes: int | None
    reserved_bytes: int | None
    host_bytes: int
    spilled_bytes: int
    noise_scale: Tensor | None
    skipped: bool
