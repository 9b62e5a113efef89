"""Rows of a data set by index: a large batch that nobody has gathered yet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray[Any, Any]

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class Rows:
    """``source[index]``, gathered a micro-batch at a time when the micro-batches' turn comes.

    A leaf of a large batch's pytree, wherever a tensor or an array may stand::

        images = numpy.load("images.npy", mmap_mode="r")
        accumulator.step(Rows(images, index), labels[index])

    The model gets tensors. Where the native prefetcher is built, its thread reads the next micro-batch's
    rows, page faults of a mapped file included, while one computes.

    Args:
        source: a tensor or a NumPy array (memory-mapped, say) of shape ``(length, ...)``. It must stay as
            it is until the step has ended; a mapped file that is made shorter in the meantime kills the
            process (SIGBUS), as any access to such a file does.
        index: integers of shape ``(samples,)`` in ``range(length)``, in any order, repeated as one likes;
            copied.

    Attributes:
        shape: ``(samples, ...)``.
        dtype: of the tensors that will be gathered.

    Raises:
        TypeError: the source is neither tensor nor array, or of a dtype that torch does not know; the
            index has no integers.
        IndexError: an index is outside of the source.
        ValueError: the source has no first dimension or was computed with gradients; the index has
            not one dimension.
    """

    def __init__(self, source: Tensor | Array, index: Tensor | Array | Sequence[int]) -> None:
        self._source = _checked_source(source)
        self._index = _checked_index(index, len(source))
        self.dtype = _dtype_of(source)

    @property
    def source(self) -> Tensor | Array:
        return self._source

    @property
    def index(self) -> Tensor:
        """int64, of shape ``(samples,)``."""
        return self._index

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self._index), *self._source.shape[1:])

    @property
    def ndim(self) -> int:
        return self._source.ndim

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, samples: slice) -> Rows:
        """Some of the rows; nothing is gathered.

        Raises:
            TypeError: ``samples`` is not a slice of step 1.
        """
        if not isinstance(samples, slice) or samples.step not in (None, 1):
            raise TypeError(
                f"Rows are cut with a slice of step 1, not with {samples!r}; take .gather() first, or "
                "choose by the index"
            )
        part = object.__new__(Rows)
        part._source, part._index, part.dtype = self._source, self._index[samples], self.dtype
        return part

    # Else iteration would go through __getitem__, and Rows seem a stream of micro-batches.
    __iter__ = None

    def gather(self) -> Tensor:
        """All rows, as a tensor of shape ``shape`` on the source's device."""
        if isinstance(self._source, Tensor):
            return self._source.index_select(0, self._index.to(self._source.device))
        return torch.from_numpy(np.asarray(self._source)[self._index.numpy()])

    def __repr__(self) -> str:
        return f"Rows(shape={self.shape}, dtype={self.dtype})"


def _checked_source(source: Any) -> Tensor | Array:
    if not isinstance(source, (Tensor, np.ndarray)):
        raise TypeError(
            f"source is a {type(source).__name__}; it must be a tensor or a NumPy array (numpy.load with "
            'mmap_mode="r" for a file)'
        )
    if source.ndim == 0:
        raise ValueError("source has no dimension; it must have shape (length, ...)")
    if isinstance(source, Tensor) and source.requires_grad:
        raise ValueError(
            "source requires gradients, which rows do not pass on; pass source.detach()"
        )
    return source


def _checked_index(index: Any, length: int) -> Tensor:
    index = torch.as_tensor(index)
    if index.numel() == 0:
        index = index.long()
    if index.ndim != 1:
        raise ValueError(
            f"index has shape {tuple(index.shape)}; it must have shape (samples,): flatten it"
        )
    if index.dtype not in _INTEGERS:
        raise TypeError(
            f"index is {index.dtype}; it must be integers: cast it, or take mask.nonzero().flatten() of "
            "a mask"
        )
    checked: Tensor = index.to("cpu", torch.int64, copy=True).contiguous()
    outside = (checked < 0) | (checked >= length)
    if outside.any():
        position = int(outside.nonzero()[0])
        raise IndexError(
            f"index[{position}] is {int(checked[position])}; it must be at least 0 and less than {length}"
            ", the rows of the source: add the length to those that count from the end, and see that "
            "index and source are of one data set"
        )
    return checked


def _dtype_of(source: Tensor | Array) -> torch.dtype:
    if isinstance(source, Tensor):
        return source.dtype
    try:
        return torch.from_numpy(np.empty(0, source.dtype)).dtype
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"source is an array of {source.dtype}, which torch does not know ({error}); cast it with "
            ".astype()"
        ) from error
