"""The ``.triton`` overloads of the batch norm ops: one launch each, and one more where statistics come
in several parts.

Everything is queued on the current stream; nothing synchronises.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import checks, triton_backend
from . import checks_batch_norm as checks_here
from .schemas import library

# What a tile holds: four loads of 16 bytes for each of the 128 threads of 4 warps.
_TILE_BYTES = 8192
_VECTOR_BYTES = 16

# Elements where they are loaded one by one: each takes registers of its own.
_MOST_SCALARS = 2048

# Columns of a tile at most, of planes and of channels: lines wide enough for whole sectors of memory,
# narrow enough that what is left over at a line's end costs little.
_WIDEST_OF_PLANES = 1024
_MOST_CHANNELS = 128

# Statistics are read by this many programs or up to twice as many, whatever the device: enough to fill
# any several times over, few enough that merging their results costs little.
_PROGRAMS = 4096

# One program merges this many results side by side, of so many channels at most.
_MERGED = 1024
_MERGED_CHANNELS = 16


@dataclass(frozen=True)
class View:
    """A dense tensor as ``triton_batch_norm_kernels`` reads it, and the tiles it is cut into."""

    planes: bool
    lines: int
    channels: int
    columns: int
    itemsize: int

    @property
    def width(self) -> int:
        """Elements of a 16-byte vector where columns are a multiple of it, else 1."""
        vector = _VECTOR_BYTES // self.itemsize
        return vector if self.columns % vector == 0 else 1

    @property
    def tile(self) -> tuple[int, int]:
        """Lines and columns of a tile, all powers of two."""
        elements = _TILE_BYTES // self.itemsize
        if self.width == 1:
            elements = min(elements, _MOST_SCALARS)
        if self.planes and self.lines == 1:
            return 1, elements
        widest = _WIDEST_OF_PLANES if self.planes else _MOST_CHANNELS
        columns = min(_power_of_two(self.columns), widest)
        return elements // columns, columns

    @property
    def groups(self) -> int:
        """Programs side by side, which have no channel in common."""
        return self.channels if self.planes else _quotient(self.columns, self.tile[1])

    @property
    def tiles(self) -> int:
        """In each group."""
        lines, columns = self.tile
        down = _quotient(self.lines, lines)
        return down * _quotient(self.columns, columns) if self.planes else down

    @property
    def tiles_per_chunk(self) -> int:
        """Tiles of one program for statistics."""
        return max(self.groups * self.tiles // _PROGRAMS, 1)

    @property
    def chunks(self) -> int:
        """In each group."""
        return _quotient(self.tiles, self.tiles_per_chunk)

    @property
    def arguments(self) -> tuple[int, int, int]:
        return self.lines, self.channels, self.columns // self.width

    @property
    def options(self) -> dict[str, int | bool]:
        lines, columns = self.tile
        return {"PLANES": self.planes, "LINES": lines, "COLUMNS": columns, "WIDTH": self.width}


@functools.lru_cache(maxsize=4096)
def view(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> View:
    """The view of a dense tensor, not empty, whose dimension 1 counts channels. A dimension of size 1
    has a stride that means nothing."""
    channels, pitch = shape[1], strides[1]
    within = [
        size
        for dim, (size, stride) in enumerate(zip(shape, strides, strict=True))
        if dim != 1 and size > 1 and (stride < pitch or channels == 1)
    ]
    inner = prod(within)
    planes = inner > 1
    return View(
        planes=planes,
        lines=prod(shape) // (channels * inner),
        channels=channels,
        columns=inner if planes else channels,
        itemsize=itemsize,
    )


def batch_norm_statistics(input: Tensor) -> Tensor:
    """See :func:`sbp_fast.ops.batch_norm_statistics`.

    Raises:
        RuntimeError: what ``checks_batch_norm`` refuses; a tensor out of Triton's reach.
    """
    result = checks_here.fake_statistics(input)
    kernels = _kernels_for("batch_norm_statistics", input)
    if input.numel() == 0:
        return result.zero_()
    with triton_backend._on(input.device):
        dense, over = _dense(input)
        partials = result.new_empty((3, over.chunks, over.channels))
        kernels.statistics[(over.groups * over.chunks,)](
            dense,
            partials,
            *over.arguments,
            over.chunks,
            over.tiles_per_chunk,
            **_options(over),
        )
        if over.chunks == 1:
            return partials[:2, 0]
        channels = min(_power_of_two(over.channels), _MERGED_CHANNELS)
        kernels.merge_statistics[(_quotient(over.channels, channels),)](
            partials,
            result,
            over.chunks,
            over.channels,
            CHUNKS=_MERGED // channels,
            CHANNELS=channels,
            **_compiler_options(),
        )
    return result


def batch_norm_normalise(input: Tensor, coefficients: Tensor) -> Tensor:
    """See :func:`sbp_fast.ops.batch_norm_normalise`.

    Raises:
        RuntimeError: as :func:`batch_norm_statistics`.
    """
    result = checks_here.fake_normalise(input, coefficients)
    kernels = _kernels_for("batch_norm_normalise", input)
    if input.numel() > 0:
        with triton_backend._on(input.device):
            dense, over = _dense(input)
            kernels.normalise[(over.groups * over.tiles,)](
                result,
                dense,
                coefficients.contiguous(),
                *over.arguments,
                **_options(over),
            )
    return result


def batch_norm_backward_statistics(
    grad_output: Tensor, input: Tensor, coefficients: Tensor
) -> Tensor:
    """See :func:`sbp_fast.ops.batch_norm_backward_statistics`.

    Raises:
        RuntimeError: as :func:`batch_norm_statistics`.
    """
    result = checks_here.fake_backward_statistics(grad_output, input, coefficients)
    kernels = _kernels_for("batch_norm_backward_statistics", input)
    if input.numel() == 0:
        return result.zero_()
    with triton_backend._on(input.device):
        dense, over = _dense(input)
        partials = result.new_empty((2, over.chunks, over.channels))
        kernels.backward_statistics[(over.groups * over.chunks,)](
            _in_order_of(dense, grad_output),
            dense,
            coefficients.contiguous(),
            partials,
            *over.arguments,
            over.chunks,
            over.tiles_per_chunk,
            **_options(over),
        )
        return partials.sum(1)


def batch_norm_backward_apply(grad_output: Tensor, input: Tensor, coefficients: Tensor) -> Tensor:
    """See :func:`sbp_fast.ops.batch_norm_backward_apply`.

    Raises:
        RuntimeError: as :func:`batch_norm_statistics`.
    """
    result = checks_here.fake_backward_apply(grad_output, input, coefficients)
    kernels = _kernels_for("batch_norm_backward_apply", input)
    if input.numel() > 0:
        with triton_backend._on(input.device):
            dense, over = _dense(input)
            kernels.backward_apply[(over.groups * over.tiles,)](
                result,
                _in_order_of(dense, grad_output),
                dense,
                coefficients.contiguous(),
                *over.arguments,
                **_options(over),
            )
    return result


def _kernels_for(op: str, tensor: Tensor) -> ModuleType:
    triton_backend._kernels_for(op, tensor.device)  # refuses what Triton cannot reach
    from . import triton_batch_norm_kernels

    return triton_batch_norm_kernels


@torch.no_grad()
def _dense(tensor: Tensor) -> tuple[Tensor, View]:
    """The tensor, or where it has gaps a copy in the order that results have; and its view."""
    if not checks.are_equal_and_dense(tensor, tensor):
        tensor = torch.empty_like(tensor).copy_(tensor)
    return tensor, view(tensor.shape, tensor.stride(), tensor.itemsize)


@torch.no_grad()
def _in_order_of(dense: Tensor, tensor: Tensor) -> Tensor:
    if checks.are_equal_and_dense(dense, tensor):
        return tensor
    return torch.empty_like(dense).copy_(tensor)


def _options(over: View) -> dict[str, Any]:
    return {**over.options, **_compiler_options()}


def _compiler_options() -> dict[str, Any]:
    options: dict[str, Any] = triton_backend._import_kernels().COMPILER_OPTIONS
    return options


def _quotient(length: int, size: int) -> int:
    return -(-length // size)


def _power_of_two(number: int) -> int:
    """The smallest that is not below."""
    return 1 << (number - 1).bit_length()


_IMPLEMENTATIONS: tuple[Callable[..., Tensor], ...] = (
    batch_norm_statistics,
    batch_norm_normalise,
    batch_norm_backward_statistics,
    batch_norm_backward_apply,
)
for _function in _IMPLEMENTATIONS:
    library.impl(f"{_function.__name__}.triton", _function, "CompositeExplicitAutograd")
