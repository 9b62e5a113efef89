"""What the ops demand of their arguments. Native kernels check the same with the same words.

Every check runs before the first element is written: a refused call changes nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
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
        _check_layout(op, f"{name}[{index}]", tensor)
        if tensor.dtype not in allowed:
            raise RuntimeError(
                f"{op}: {name}[{index}] has dtype {tensor.dtype}; it must be one of "
                + ", ".join(str(dtype) for dtype in allowed)
            )


def _check_layout(op: str, name: str, tensor: Tensor) -> None:
    if tensor.layout is not torch.strided:
        raise RuntimeError(
            f"{op}: {name} is not in the layout torch.strided; it must be dense, "
            "call .to_dense() on it first"
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


def check_separate(
    op: str,
    written_name: str,
    written: Sequence[Tensor],
    read_name: str,
    read: Sequence[Tensor],
) -> None:
    """Refuses what is written where it shares memory: chunks are written in no particular order.

    A tensor that is read may be its counterpart itself: an op in place, element by element. Tensors
    with gaps may be interleaved, so only their first element counts. Needs addresses: fake tensors
    pass unchecked.
    """
    count = len(written)
    # Some devices use the upper half of the address space: negative as a signed integer.
    addresses = [tensor.data_ptr() for tensor in (*written, *read)]
    begin = np.array(addresses, np.uint64).view(np.int64)
    size = np.array([_bytes_of_its_own(tensor) for tensor in (*written, *read)], np.int64)
    for index in np.flatnonzero(begin[:count] == begin[count:]).tolist():
        if _are_in_one_order(written[index], read[index]):
            size[count + index] = 0

    occupied = np.flatnonzero(size)
    order = occupied[np.argsort(begin[occupied], kind="stable")]
    begin, end, is_written = begin[order], (begin + size)[order], order < count
    # How far the ranges before each one reach, of those that it must not meet.
    reach_of_all = np.maximum.accumulate(end)[:-1]
    written_end = np.where(is_written, end, np.iinfo(np.int64).min)
    reach_of_written = np.maximum.accumulate(written_end)[:-1]
    reach = np.where(is_written[1:], reach_of_all, reach_of_written)
    clashes = np.flatnonzero(begin[1:] < reach)
    if len(clashes) == 0:
        return
    current = int(clashes[0]) + 1
    barred = (end > begin[current]) & (is_written | is_written[current])
    one, other = sorted(order[[np.flatnonzero(barred)[0], current]].tolist())
    if other < count:
        raise RuntimeError(
            f"{op}: {written_name}[{one}] and {written_name}[{other}] share memory; "
            "pass each tensor once"
        )
    raise RuntimeError(
        f"{op}: {written_name}[{one}] and {read_name}[{other - count}] share memory; "
        f"pass a .clone() of {read_name}[{other - count}]"
    )


def _bytes_of_its_own(tensor: Tensor) -> int:
    if tensor.is_contiguous() or are_equal_and_dense(tensor, tensor):
        return tensor.nbytes
    return tensor.itemsize


def _are_in_one_order(a: Tensor, b: Tensor) -> bool:
    """True where equal first addresses mean equal addresses of all elements."""
    if a.dtype != b.dtype:
        return False
    if a.is_contiguous() and b.is_contiguous():
        return True
    strides = zip(a.shape, a.stride(), b.stride(), strict=True)
    return all(size == 1 or one == other for size, one, other in strides)


def are_equal_and_dense(a: Tensor, b: Tensor) -> bool:
    """True where the elements of both fill a stretch of memory without gaps, in the same order."""
    if a.is_contiguous() and b.is_contiguous():
        return True
    return a.numel() == 0 or _strides_equal_and_dense(a.shape, a.stride(), b.stride())


@functools.lru_cache(maxsize=4096)
def _strides_equal_and_dense(
    shape: tuple[int, ...], strides: tuple[int, ...], others: tuple[int, ...]
) -> bool:
    """Dense: some order of the dimensions makes it contiguous. A dimension of size 1 has a stride
    that means nothing, so it counts in neither question."""
    reach = 1
    for stride, other, size in sorted(zip(strides, others, shape, strict=True)):
        if size == 1:
            continue
        if stride != other or stride != reach:
            return False
        reach *= size
    return True


def _check_statistics(op: str, statistics: Tensor, tensors: Sequence[Tensor]) -> None:
    _check_layout(op, "statistics", statistics)
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
    _check_layout(op, name, value)
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
