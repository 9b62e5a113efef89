# Compile-time arguments are in capitals, as everywhere in Triton; an `else` after a `return` is
# compiled only where it holds. Triton has no types to annotate with.
# ruff: noqa: N803, N806, RET505
# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator"
"""The Triton kernels of batch norm. Import only where Triton is installed; ``triton_batch_norm``
launches them.

A dense tensor is read as ``lines`` of ``columns`` elements that lie side by side:

``PLANES``  channels lie outside: of shape (lines, channels, columns), and a channel is all lines of
            its columns. (N, C, H, W) has N lines of H * W columns.
otherwise   channels lie innermost: of shape (lines, columns), and a channel is a column. (N, C) has N
            lines; channels_last has N * H * W.

A program works on tiles of ``LINES`` by ``COLUMNS`` elements. Where ``WIDTH`` elements are 16 bytes,
that is promised of lines too: columns come as a number of vectors of ``WIDTH``, from which the
compiler sees that masks and addresses allow 128-bit accesses.

Sums are taken in float64; statistics as those of tiles, merged. Results are always added in the same
order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_kernels import _narrow

# What sizes are is promised by WIDTH alone: one compilation serves all of them.
_SIZES = ["lines", "channels", "vectors"]
_SIZES_AND_CHUNKS = [*_SIZES, "chunks", "tiles_per_chunk"]


@triton.jit
def _wide(values):
    """As the arithmetic has it: 16-bit values as float32, the others as they are."""
    if values.dtype == tl.float64:
        return values
    else:
        return values.to(tl.float32)


@triton.jit
def _fours(values, PLANES: tl.constexpr, LINES: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile as four quarters, one behind the other. What then lies side by side is one lane: one
    thread holds all four, so that their sum costs nothing but additions."""
    if PLANES:
        return tl.reshape(values, [4, LINES * COLUMNS // 4])
    else:
        return tl.reshape(values, [4, LINES // 4, COLUMNS])


@triton.jit
def _lanes(values, PLANES: tl.constexpr, LINES: tl.constexpr, COLUMNS: tl.constexpr):
    """Sums of four in float64: to convert every element would take longer than to load it."""
    return tl.sum(_fours(values, PLANES, LINES, COLUMNS), 0).to(tl.float64)


@triton.jit
def _no_lanes(PLANES: tl.constexpr, LINES: tl.constexpr, COLUMNS: tl.constexpr):
    if PLANES:
        return tl.zeros([LINES * COLUMNS // 4], tl.float64)
    else:
        return tl.zeros([LINES // 4, COLUMNS], tl.float64)


@triton.jit
def _sizes(lines, channels, vectors, WIDTH: tl.constexpr):
    """As 64-bit numbers. That columns are a multiple of WIDTH is seen from the product."""
    return lines.to(tl.int64), channels.to(tl.int64), vectors.to(tl.int64) * WIDTH


@triton.jit
def _tiles(length, SIZE: tl.constexpr):
    return (length + (SIZE - 1)) // SIZE


@triton.jit
def _program(channels, columns, PLANES: tl.constexpr, COLUMNS: tl.constexpr):
    """What a program does: its channel, or its tile's position among the columns; and its chunk."""
    program = tl.program_id(0).to(tl.int64)
    if PLANES:
        return program % channels, program // channels
    else:
        across = _tiles(columns, COLUMNS)
        return program % across, program // across


@triton.jit
def _tile(
    which,
    tile,
    lines,
    channels,
    columns,
    PLANES: tl.constexpr,
    LINES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Offsets and mask of a tile, its height and its width. ``which`` is the first that `_program`
    returns, ``tile`` counts along a channel's lines (and columns, of planes)."""
    if PLANES:
        across = _tiles(columns, COLUMNS)
        line = tile // across * LINES
        column = tile % across * COLUMNS
        pitch = channels * columns
        start = which * columns + line * pitch + column
    else:
        line = tile * LINES
        column = which * COLUMNS
        pitch = columns
        start = line * pitch + column
    height = tl.minimum(lines - line, LINES).to(tl.int32)
    width = tl.minimum(columns - column, COLUMNS).to(tl.int32)
    down = tl.arange(0, LINES)[:, None]
    along = tl.arange(0, COLUMNS)[None, :]
    mask = (down < height) & (along < width)
    return start + down * pitch + along, mask, height, width


@triton.jit
def _channels_of(which, channels, PLANES: tl.constexpr, COLUMNS: tl.constexpr):
    """Offsets of a program's channels in a row of coefficients, and which of them there are."""
    if PLANES:
        return which, which < channels
    else:
        channel = which * COLUMNS + tl.arange(0, COLUMNS)
        return channel, channel < channels


@triton.jit
def _coefficient(coefficients, row, channels, channel, mask):
    return tl.load(coefficients + row * channels + channel, mask=mask, other=0.0)


@triton.jit
def _if_finite(values, otherwise):
    return tl.where(tl.abs(values) < float("inf"), values, otherwise)


@triton.jit
def _centre(coefficients, channel, mask, DTYPE: tl.constexpr):
    """The mean rounded to ``DTYPE``, from which elements' distances are taken, and in float64 what
    rounding has left. Far above the deviation that would be felt in every element; sums and constants
    make up for it."""
    mean = tl.load(coefficients + channel, mask=mask, other=0.0)
    centre = mean.to(DTYPE)
    return centre, mean - centre.to(tl.float64)


@triton.jit
def _chunk(
    chunk,
    tiles_per_chunk,
    lines,
    columns,
    PLANES: tl.constexpr,
    LINES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The first tile of a chunk, and the one after its last."""
    tiles = _tiles(lines, LINES)
    if PLANES:
        tiles *= _tiles(columns, COLUMNS)
    first = chunk * tiles_per_chunk
    return first, tl.minimum(first + tiles_per_chunk, tiles)


@triton.jit
def _moments_of_plane(values, mask, count, LINES: tl.constexpr, COLUMNS: tl.constexpr):
    """Mean and M2 of all elements of a tile. No distance is taken from an infinite mean."""
    near = _if_finite(tl.sum(values) / count.to(values.dtype), 0.0)
    apart = tl.where(mask, values - near, 0.0)
    # What rounding has left between `near` and the mean.
    rest = tl.sum(_lanes(apart, True, LINES, COLUMNS))
    squares = tl.sum(_lanes(apart * apart, True, LINES, COLUMNS))
    return near.to(tl.float64) + rest / count, squares - rest * rest / count


@triton.jit
def _moments_of_lanes(values, mask, count, LINES: tl.constexpr, COLUMNS: tl.constexpr):
    """The same of each lane: of four elements or, at the end, fewer."""
    values = _fours(values, False, LINES, COLUMNS)
    count = tl.maximum(count, 1.0)
    near = _if_finite(tl.sum(values, 0) / count.to(values.dtype), 0.0)
    apart = tl.where(_fours(mask, False, LINES, COLUMNS), values - near[None, :, :], 0.0)
    rest = tl.sum(apart, 0).to(tl.float64)
    squares = tl.sum(apart * apart, 0).to(tl.float64)
    return near.to(tl.float64) + rest / count, squares - rest * rest / count


@triton.jit(do_not_specialize=_SIZES_AND_CHUNKS)
def statistics(
    inputs,
    partials,
    lines,
    channels,
    vectors,
    chunks,
    tiles_per_chunk,
    PLANES: tl.constexpr,
    LINES: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Mean, M2 and number of elements of each channel in one chunk of tiles.

    partials: float64[3, chunks, channels]. Squares are of distances from a mean close by, of the tile
    or of four elements, and merged from there (Chan, Golub and LeVeque 1983, formulae 2.1).
    """
    lines, channels, columns = _sizes(lines, channels, vectors, WIDTH)
    which, chunk = _program(channels, columns, PLANES, COLUMNS)
    tile, end = _chunk(chunk, tiles_per_chunk, lines, columns, PLANES, LINES, COLUMNS)
    if PLANES:
        count = tl.full([], 0.0, tl.float64)
        mean = count
        squares = count
    else:
        count = tl.zeros([LINES // 4, 1], tl.float64)
        mean = _no_lanes(PLANES, LINES, COLUMNS)
        squares = mean
    while tile < end:
        offsets, mask, height, width = _tile(
            which, tile, lines, channels, columns, PLANES, LINES, COLUMNS
        )
        values = _wide(tl.load(inputs + offsets, mask=mask, other=0.0))
        if PLANES:
            count_here = (height * width).to(tl.float64)
            mean_here, squares_here = _moments_of_plane(values, mask, count_here, LINES, COLUMNS)
        else:
            below = tl.maximum(height - tl.arange(0, LINES // 4)[:, None], 0)
            count_here = _tiles(below, LINES // 4).to(tl.float64)
            mean_here, squares_here = _moments_of_lanes(values, mask, count_here, LINES, COLUMNS)
        delta = mean_here - mean
        share = count_here / tl.maximum(count + count_here, 1.0)
        mean = tl.where(tl.abs(delta) < float("inf"), mean + delta * share, mean + mean_here)
        # Rounding must not make it negative; a NaN stays.
        squares += tl.where(squares_here < 0.0, 0.0, squares_here) + delta * delta * count * share
        count += count_here
        tile += 1
    if not PLANES:
        lanes, centres = count, mean
        count = tl.sum(lanes)
        mean = tl.sum(lanes * centres, 0) / count
        apart = centres - mean
        squares = tl.sum(squares + lanes * apart * apart, 0)
    channel, there = _channels_of(which, channels, PLANES, COLUMNS)
    partial = partials + chunk * channels + channel
    row = chunks * channels
    tl.store(partial, mean, mask=there)
    tl.store(partial + row, squares, mask=there)
    tl.store(partial + 2 * row, count + tl.zeros_like(mean), mask=there)


@triton.jit(do_not_specialize=["chunks", "channels"])
def merge_statistics(
    partials, results, chunks, channels, CHUNKS: tl.constexpr, CHANNELS: tl.constexpr
):
    """Mean and M2 of each channel from those of its chunks, always in the same order.

    partials: float64[3, chunks, channels]. results: float64[2, channels].
    """
    channels = channels.to(tl.int64)
    channel = tl.program_id(0).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    first = tl.arange(0, CHUNKS)[:, None]
    row = chunks * channels
    counts = tl.zeros([CHUNKS, CHANNELS], tl.float64)
    sums = tl.zeros([CHUNKS, CHANNELS], tl.float64)
    start = 0
    while start < chunks:
        mask = (start + first < chunks) & (channel < channels)
        partial = partials + (start + first) * channels + channel
        count = tl.load(partial + 2 * row, mask=mask, other=0.0)
        counts += count
        sums += count * tl.load(partial, mask=mask, other=0.0)
        start += CHUNKS
    mean = tl.sum(sums, 0) / tl.maximum(tl.sum(counts, 0), 1.0)

    squares = tl.zeros([CHUNKS, CHANNELS], tl.float64)
    start = 0
    while start < chunks:
        mask = (start + first < chunks) & (channel < channels)
        partial = partials + (start + first) * channels + channel
        count = tl.load(partial + 2 * row, mask=mask, other=0.0)
        delta = tl.load(partial, mask=mask, other=0.0) - mean
        squares += tl.load(partial + row, mask=mask, other=0.0) + count * delta * delta
        start += CHUNKS
    there = channel < channels
    tl.store(results + channel, mean[None, :], mask=there)
    tl.store(results + channels + channel, tl.sum(squares, 0)[None, :], mask=there)


@triton.jit(do_not_specialize=_SIZES_AND_CHUNKS)
def backward_statistics(
    grad_outputs,
    inputs,
    coefficients,
    partials,
    lines,
    channels,
    vectors,
    chunks,
    tiles_per_chunk,
    PLANES: tl.constexpr,
    LINES: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """sum(dy) and sum(dy * xhat) of each channel in one chunk of tiles.

    coefficients: float64[2, channels]: mean, inv_std. partials: float64[2, chunks, channels].
    """
    lines, channels, columns = _sizes(lines, channels, vectors, WIDTH)
    which, chunk = _program(channels, columns, PLANES, COLUMNS)
    channel, there = _channels_of(which, channels, PLANES, COLUMNS)
    WIDE: tl.constexpr = tl.float64 if inputs.dtype.element_ty == tl.float64 else tl.float32
    centre, rest = _centre(coefficients, channel, there, WIDE)
    sums = _no_lanes(PLANES, LINES, COLUMNS)
    products = sums
    tile, end = _chunk(chunk, tiles_per_chunk, lines, columns, PLANES, LINES, COLUMNS)
    while tile < end:
        offsets, mask, _, _ = _tile(which, tile, lines, channels, columns, PLANES, LINES, COLUMNS)
        gradients = _wide(tl.load(grad_outputs + offsets, mask=mask, other=0.0))
        values = _wide(tl.load(inputs + offsets, mask=mask, other=0.0))
        products_here = tl.where(mask, gradients * (values - centre), 0.0)
        sums += _lanes(gradients, PLANES, LINES, COLUMNS)
        products += _lanes(products_here, PLANES, LINES, COLUMNS)
        tile += 1
    inv_std = _coefficient(coefficients, 1, channels, channel, there)
    partial = partials + chunk * channels + channel
    row = chunks * channels
    # All lanes of a plane, or those of each column.
    AXIS: tl.constexpr = None if PLANES else 0
    total = tl.sum(sums, AXIS)
    tl.store(partial, total, mask=there)
    tl.store(
        partial + row,
        (tl.sum(products, AXIS) - _if_finite(rest * total, 0.0)) * inv_std,
        mask=there,
    )


@triton.jit(do_not_specialize=_SIZES)
def normalise(
    outputs,
    inputs,
    coefficients,
    lines,
    channels,
    vectors,
    PLANES: tl.constexpr,
    LINES: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One tile of (x - mean) * scale + shift. coefficients: float64[3, channels], in this order."""
    lines, channels, columns = _sizes(lines, channels, vectors, WIDTH)
    which, tile = _program(channels, columns, PLANES, COLUMNS)
    channel, there = _channels_of(which, channels, PLANES, COLUMNS)
    offsets, mask, _, _ = _tile(which, tile, lines, channels, columns, PLANES, LINES, COLUMNS)
    values = _wide(tl.load(inputs + offsets, mask=mask, other=0.0))
    centre, rest = _centre(coefficients, channel, there, values.dtype)
    scale = _coefficient(coefficients, 1, channels, channel, there)
    shift = _coefficient(coefficients, 2, channels, channel, there)
    shift -= _if_finite(rest * scale, 0.0)
    result = (values - centre) * scale.to(values.dtype) + shift.to(values.dtype)
    tl.store(outputs + offsets, _narrow(result, outputs.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_SIZES)
def backward_apply(
    outputs,
    grad_outputs,
    inputs,
    coefficients,
    lines,
    channels,
    vectors,
    PLANES: tl.constexpr,
    LINES: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One tile of a * dy + b * (x - mean) + c. coefficients: float64[4, channels]: mean, a, b, c."""
    lines, channels, columns = _sizes(lines, channels, vectors, WIDTH)
    which, tile = _program(channels, columns, PLANES, COLUMNS)
    channel, there = _channels_of(which, channels, PLANES, COLUMNS)
    offsets, mask, _, _ = _tile(which, tile, lines, channels, columns, PLANES, LINES, COLUMNS)
    gradients = _wide(tl.load(grad_outputs + offsets, mask=mask, other=0.0))
    values = _wide(tl.load(inputs + offsets, mask=mask, other=0.0))
    centre, rest = _centre(coefficients, channel, there, values.dtype)
    a = _coefficient(coefficients, 1, channels, channel, there)
    b = _coefficient(coefficients, 2, channels, channel, there)
    c = _coefficient(coefficients, 3, channels, channel, there)
    c -= _if_finite(rest * b, 0.0)
    near = (values - centre) * b.to(values.dtype) + c.to(values.dtype)
    result = gradients * a.to(values.dtype) + near
    tl.store(outputs + offsets, _narrow(result, outputs.dtype.element_ty), mask=mask)
