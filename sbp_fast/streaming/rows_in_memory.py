"""Where the rows of a leaf lie in host memory, as the prefetcher's thread reads them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.rows import Rows


@dataclass(frozen=True)
class RowsInMemory:
    """Rows of one tensor-to-be.

    Attributes:
        shape, dtype: of the tensor.
        strides: of the tensor, in elements: rows one after the other; within a row as in the source where
            a row is dense there (channels_last, say), else contiguous.
        source: arguments of the native ``Piece`` that say what is read.
        one_run: all rows are one run of bytes, which may be read in place.
        owners: what keeps the memory alive.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    strides: tuple[int, ...]
    source: dict[str, Any]
    one_run: bool
    owners: tuple[Any, ...]

    @property
    def pinned(self) -> bool:
        """Whether a device can read them where they are."""
        source = self.owners[0]
        return self.one_run and isinstance(source, Tensor) and source.is_pinned()

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def rows_in_memory(leaf: Rows | Tensor | np.ndarray[Any, Any]) -> RowsInMemory:
    """Of a leaf on the host; a tensor without dimensions is a single row."""
    index = leaf.index if isinstance(leaf, Rows) else None
    source = leaf.source if isinstance(leaf, Rows) else leaf
    if isinstance(source, Tensor):
        # The bits of a lazy conjugate are not its values.
        source = source.resolve_conj().resolve_neg()
        address, itemsize, dtype = source.data_ptr(), source.itemsize, source.dtype
        steps = tuple(stride * itemsize for stride in source.stride())
    else:
        address, itemsize, steps = source.ctypes.data, source.itemsize, source.strides
        dtype = leaf.dtype if isinstance(leaf, Rows) else torch.from_numpy(source[:0].copy()).dtype
    length = source.shape[0] if source.ndim else 1
    row_shape = tuple(source.shape[1:])
    stride, row_steps = (steps[0], steps[1:]) if steps else (itemsize, ())
    row_bytes = math.prod(row_shape) * itemsize

    if _is_dense(row_shape, row_steps, itemsize):
        inner: list[tuple[int, int]] = []
        run = row_bytes
        # Those of a single element may be anything.
        row_strides = tuple(max(step // itemsize, 0) for step in row_steps)
    else:
        inner, run = _dense_runs(row_shape, row_steps, itemsize)
        row_strides = _contiguous(row_shape)
    return RowsInMemory(
        shape=tuple(leaf.shape),
        dtype=dtype,
        strides=(math.prod(row_shape), *row_strides) if source.ndim else (),
        source={
            **{"first": address, "length": length, "stride": stride, "inner": inner, "run": run},
            "index": 0 if index is None else index.data_ptr(),
            "count": length if index is None else len(index),
        },
        one_run=index is None and not inner and (stride == run or length == 1),
        owners=(source, index),
    )


def _is_dense(shape: tuple[int, ...], steps: tuple[int, ...], itemsize: int) -> bool:
    """Whether a row is one run of bytes, in whatever order of its dimensions."""
    expected = itemsize
    for step, count in sorted(zip(steps, shape, strict=True)):
        if count != 1:
            if step != expected:
                return False
            expected *= count
    return True


def _dense_runs(
    shape: tuple[int, ...], steps: tuple[int, ...], itemsize: int
) -> tuple[list[tuple[int, int]], int]:
    """The outer dimensions of a row with their steps, and the bytes of the runs inside of them."""
    run, outer = itemsize, len(shape)
    while outer and steps[outer - 1] == run:
        outer -= 1
        run *= shape[outer]
    return list(zip(shape[:outer], steps[:outer], strict=True)), run


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[position + 1 :]) for position in range(len(shape)))
