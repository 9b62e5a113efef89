"""What the ops demand of their arguments. Native kernels check the same with the same words.

Every check runs before the first element is written: a refused call changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

ACCUMULATOR_DTYPES = (torch.float32, torch.float64)
GRADIENT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

STATISTICS_SIZE = 3


def check_scale_accumulate(
    accumulators: Sequence[Tensor],
    gradients: Sequence[Tensor],
    scale: float,
    first_write: bool = False,
    statistics: Tensor | None = None,
) -> None:
    op = "scale_accumulate_"
    _check_pairs(op, "accumulators", accumulators, "gradients", gradients)
    _check_dtypes(op, "accumulators", accumulators, ACCUMULATOR_DTYPES)
    _check_dtypes(op, "gradients", gradients, GRADIENT_DTYPES)
    _check_written(op, "accumulators", accumulators)
    if statistics is not None:
        _check_statistics(op, statistics, accumulators)


def check_gradient_statistics(gradients: Sequence[Tensor], statistics: Tensor) -> None:
    op = "gradient_statistics_"
    _check_dtypes(op, "gradients", gradients, GRADIENT_DTYPES)
    _check_one_device(op, "gradients", gradients)
    _check_statistics(op, statistics, gradients)


def check_finalise(
    outputs: Sequence[Tensor],
    accumulators: Sequence[Tensor],
    scale: Tensor,
    norm: Tensor | None = None,
    max_norm: float | None = None,
) -> None:
    op = "finalise_"
    _check_pairs(op, "outputs", outputs, "accumulators", accumulators)
    _check_dtypes(op, "outputs", outputs, GRADIENT_DTYPES)
    _check_dtypes(op, "accumulators", accumulators, ACCUMULATOR_DTYPES)
    _check_written(op, "outputs", outputs)
    _check_scalar(op, "scale", scale, accumulators)
    if (norm is None) != (max_norm is None):
        raise RuntimeError(
            f"{op}: norm and max_norm go together, got norm={norm!r} and max_norm={max_norm!r}; "
            "give both to clip, neither not to"
        )
    if norm is not None and max_norm is not None:
        _check_scalar(op, "norm", norm, accumulators)
        if not max_norm > 0:
            raise RuntimeError(f"{op}: max_norm is {max_norm}; it must be greater than 0")


def _check_pairs(
    op: str, left_name: str, left: Sequence[Tensor], right_name: str, right: Sequence[Tensor]
) -> None:
    if len(left) != len(right):
        raise RuntimeError(
            f"{op}: {len(left)} {left_name} but {len(right)} {right_name}; "
            "the lists must have the same length"
        )
    for index, (a, b) in enumerate(zip(left, right, strict=True)):
        if a.shape != b.shape:
            raise RuntimeError(
                f"{op}: {left_name}[{index}] has shape {tuple(a.shape)} but {right_name}[{index}] "
                f"has shape {tuple(b.shape)}; the shapes must be equal"
            )
    _check_one_device(op, left_name, left)
    for index, b in enumerate(right):
        if b.device != left[0].device:
            raise RuntimeError(
                f"{op}: {right_name}[{index}] is on {b.device} but {left_name}[0] is on "
                f"{left[0].device}; all tensors of a call must share one device"
            )


def _check_one_device(op: str, name: str, tensors: Sequence[Tensor]) -> None:
    for index, tensor in enumerate(tensors):
        if tensor.device != tensors[0].device:
            raise RuntimeError(
                f"{op}: {name}[{index}] is on {tensor.device} but {name}[0] is on "
                f"{tensors[0].device}; all tensors of a call must share one device"
            )


def _check_dtypes(
    op: str, name: str, tensors: Sequence[Tensor], allowed: tuple[torch.dtype, ...]
) -> None:
    for index, tensor in enumerate(tensors):
        if tensor.layout is not torch.strided:
            raise RuntimeError(
                f"{op}: {name}[{index}] is not in the layout torch.strided; it must be dense, "
                "call .to_dense() on it first"
            )
        if tensor.dtype not in allowed:
            raise RuntimeError(
                f"{op}: {name}[{index}] has dtype {tensor.dtype}; it must be one of "
                + ", ".join(str(dtype) for dtype in allowed)
            )


def _check_written(op: str, name: str, tensors: Sequence[Tensor]) -> None:
    for index, tensor in enumerate(tensors):
        if overlaps_itself(tensor):
            raise RuntimeError(
                f"{op}: {name}[{index}] has shape {tuple(tensor.shape)} and strides "
                f"{tensor.stride()}, so that elements share memory; pass a .clone() of it"
            )


def overlaps_itself(tensor: Tensor) -> bool:
    """True where two indices may reach one address: some stride is too small to step over the
    dimensions below it. Sufficient for every layout that PyTorch makes by itself."""
    if tensor.is_contiguous():
        return False
    reach = 1
    dimensions = sorted(
        (stride, size)
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
        if size > 1
    )
    if tensor.numel() == 0:
        return False
    for stride, size in dimensions:
        if stride < reach:
            return True
        reach += stride * (size - 1)
    return False


def check_separate(op: str, name: str, tensors: Sequence[Tensor]) -> None:
    """Refuses written tensors that share memory: chunks are written in no particular order.

    Needs addresses, so fake tensors pass unchecked. Tensors with gaps may be interleaved and pass too.
    """
    ranges = sorted(
        (tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes, index)
        for index, tensor in enumerate(tensors)
        if tensor.is_contiguous() and tensor.numel() > 0
    )
    for (_, end, index), (begin, _, following) in pairwise(ranges):
        if begin < end:
            one, other = sorted((index, following))
            raise RuntimeError(
                f"{op}: {name}[{one}] and {name}[{other}] share memory; pass each tensor once"
            )


def _check_statistics(op: str, statistics: Tensor, tensors: Sequence[Tensor]) -> None:
    if (
        statistics.dtype != torch.float64
        or tuple(statistics.shape) != (STATISTICS_SIZE,)
        or not statistics.is_contiguous()
    ):
        raise RuntimeError(
            f"{op}: statistics is a {statistics.dtype} tensor of shape {tuple(statistics.shape)}; "
            f"it must be contiguous, torch.float64, of shape ({STATISTICS_SIZE},)"
        )
    _check_same_device(op, "statistics", statistics, tensors)


def _check_scalar(op: str, name: str, value: Tensor, tensors: Sequence[Tensor]) -> None:
    if value.dtype != torch.float64 or value.dim() != 0:
        raise RuntimeError(
            f"{op}: {name} is a {value.dtype} tensor of shape {tuple(value.shape)}; "
            "it must be a torch.float64 tensor of no dimensions"
        )
    _check_same_device(op, name, value, tensors)


def _check_same_device(op: str, name: str, value: Tensor, tensors: Sequence[Tensor]) -> None:
    if tensors and value.device != tensors[0].device:
        raise RuntimeError(
            f"{op}: {name} is on {value.device} but the tensors are on {tensors[0].device}; "
            "all tensors of a call must share one device"
        )
