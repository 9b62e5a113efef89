"""The fused kernels as functions. Each is one pass over memory and one launch per call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .backends import (
    BACKENDS,
    BackendUnavailableError,
    availability,
    is_automatic,
    operator,
    resolve,
)
from .batch_norm import (
    batch_norm_backward_apply,
    batch_norm_backward_statistics,
    batch_norm_normalise,
    batch_norm_statistics,
)
from .checks import GRADIENT_DTYPES, STATISTICS_SIZE
from .dropout import dropout

__all__ = [
    "BACKENDS",
    "GRADIENT_DTYPES",
    "BackendUnavailableError",
    "availability",
    "batch_norm_backward_apply",
    "batch_norm_backward_statistics",
    "batch_norm_normalise",
    "batch_norm_statistics",
    "dropout",
    "finalise_",
    "gradient_statistics_",
    "is_automatic",
    "new_statistics",
    "resolve",
    "scale_accumulate_",
]


def new_statistics(device: torch.device | str = "cpu") -> Tensor:
    """Zeroed statistics for the ops below: a ``float64`` tensor of shape ``(3,)``.

    ``[0]``: sum of squares of what came in; ``[1]``: sum of squares of the results; ``[2]``: 1.0 once
    any result was infinite or NaN. The ops add to it, so one tensor can collect many calls.
    """
    return torch.zeros(STATISTICS_SIZE, dtype=torch.float64, device=device)


def scale_accumulate_(
    accumulators: Sequence[Tensor],
    gradients: Sequence[Tensor],
    scale: float,
    *,
    first_write: bool = False,
    statistics: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """``accumulators[i] += scale * gradients[i]`` for all ``i``, in place, in one pass.

    This is the accumulation ``G = sum of G_i`` of Small-Batch Processing (Ravi Kumar and Sivakumar
    2025, section 2), with the loss normalisation folded in as ``scale``.

    Args:
        accumulators: float32 or float64 tensors, written in place. Any layout whose elements do not
            share memory, and no two accumulators may.
        gradients: float32, float64, bfloat16 or float16 tensors of the same shapes, in any layout,
            apart from the accumulators' memory (only ``accumulators[i]`` itself may be ``gradients[i]``).
            Where an accumulator and its gradient have equal strides the pass is flat and fastest.
        scale: factor on every gradient; rounded to the accumulator's dtype.
        first_write: store ``scale * gradients[i]`` without reading the accumulators, which may hold
            anything: cheaper than zeroing and adding.
        statistics: see :func:`new_statistics`; what comes in is squared before scaling.
        backend: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"triton"`` or ``"reference"``. An explicit choice
            never falls back.

    Raises:
        RuntimeError: lists of different length, unequal shapes, unsupported dtypes, several devices,
            shared memory. Nothing has been written then. Tensors with gaps may be interleaved; how
            those share memory is noticed only where it includes the first element of one.
        ValueError, BackendUnavailableError: an unknown or unusable backend.
    """
    if not accumulators and not gradients:
        return
    _operator("scale_accumulate_", backend, accumulators or gradients)(
        accumulators, gradients, scale, first_write, statistics
    )
    _count_as_written(accumulators, statistics)


def gradient_statistics_(
    gradients: Sequence[Tensor], statistics: Tensor, *, backend: str = "auto"
) -> None:
    """Adds the sum of squares and the non-finite flag of ``gradients`` to ``statistics``.

    For gradients that need no accumulation because they are already whole: one read, no write.

    Args:
        gradients: float32, float64, bfloat16 or float16 tensors of any shapes and layouts.
        statistics: see :func:`new_statistics`; ``[0]`` and ``[1]`` grow by the same sum.
        backend: as in :func:`scale_accumulate_`.

    Raises:
        RuntimeError, ValueError, BackendUnavailableError: as :func:`scale_accumulate_`.
    """
    if not gradients:
        return
    _operator("gradient_statistics_", backend, gradients)(gradients, statistics)
    _count_as_written((), statistics)


def finalise_(
    outputs: Sequence[Tensor],
    accumulators: Sequence[Tensor],
    scale: float | Tensor = 1.0,
    *,
    norm: Tensor | None = None,
    max_norm: float | None = None,
    backend: str = "auto",
) -> None:
    """Scales, clips and casts accumulators into gradients, in one pass.

    ``outputs[i] = accumulators[i] * scale * min(1, max_norm / (norm + 1e-6))``, rounded to the output's
    dtype; the clipping factor is that of :func:`torch.nn.utils.clip_grad_norm_`.

    Args:
        outputs: float32, float64, bfloat16 or float16 tensors. ``outputs[i]`` may be
            ``accumulators[i]`` itself, of the same dtype and strides; otherwise an output may share
            no memory with any other tensor of the lists.
        accumulators: float32 or float64 tensors of the same shapes.
        scale: a number, or a ``float64`` tensor of no dimensions on the same device (never read back
            to the host).
        norm: the norm of ``scale * accumulators``, already known: a ``float64`` tensor of no
            dimensions. A NaN norm makes every output NaN.
        max_norm: the largest norm that may remain; goes with ``norm``.
        backend: as in :func:`scale_accumulate_`.

    Raises:
        RuntimeError, ValueError, BackendUnavailableError: as :func:`scale_accumulate_`.
    """
    if not outputs and not accumulators:
        return
    if not isinstance(scale, Tensor):
        device = (outputs or accumulators)[0].device
        scale = torch.full((), scale, dtype=torch.float64, device=device)
    _operator("finalise_", backend, outputs or accumulators)(
        outputs, accumulators, scale, norm, max_norm
    )
    _count_as_written(outputs, None)


def _operator(name: str, backend: str, tensors: Sequence[Tensor]) -> torch._ops.OpOverload:
    return operator(name, backend, tensors[0].device.type)


def _count_as_written(tensors: Sequence[Tensor], statistics: Tensor | None) -> None:
    """Lets autograd see the writes: a backward that saved one of these tensors must refuse to use it."""
    if torch.compiler.is_compiling():  # the compiler follows the schema by itself
        return
    increment_version(tensors)
    if statistics is not None:
        increment_version(statistics)
