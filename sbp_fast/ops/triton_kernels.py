# Compile-time arguments are in capitals, as everywhere in Triton, and come first in comparisons; an
# `else` after a `return` is compiled only where it holds. Triton has no types to annotate with.
# ruff: noqa: N803, N806, RET505, SIM300
# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator"
"""The Triton kernels. Import only where Triton is installed; ``triton_backend`` launches them.

Each program takes one row of the chunk table (see ``chunk_table``): where the chunk that it writes
lies, where the chunk that it reads lies, how many elements both hold, and one float64 as its bits.
Addresses are 64-bit integers, so one launch serves many tensors and a tensor may hold 2^31 elements
or more; only offsets within a chunk are 32-bit.

The types of a launch are compile-time arguments (``tl.dtype``). ``ALIGNED`` promises that both
addresses are multiples of 16 bytes, which is what makes the compiler emit 128-bit accesses. For the
same reason whole blocks carry no mask: only a chunk's last, partial block does.

Loops are `while` loops because the interpreter of Triton 3.6 cannot count to a number read from
memory with numpy 2.4; the compiler turns them into counted ones.
"""

from __future__ import annotations

import triton
import triton.language as tl

# 1,024 elements are 8 for each of the 128 threads of 4 warps: 16 bytes of a 2-byte type, twice 16
# of float32. A larger block only costs registers.
BLOCK = 1024
# Fusing is stated because its default changes between versions of Triton: a product and a sum are
# one instruction, as C++ and CUDA compilers make them in the native kernels.
COMPILER_OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}

TABLE_COLUMNS = tl.constexpr(4)
PARTIAL_COLUMNS = tl.constexpr(4)


@triton.jit
def _pointer(row, COLUMN: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(row + COLUMN).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        # The promise has to sit on the pointer: made on the integer, it is lost in the cast.
        pointer = tl.multiple_of(pointer, 16)
    return pointer


# With TRITON_INTERPRET=1 set when this file is imported, Triton interprets its kernels, in numpy.
INTERPRETED = tl.constexpr(not isinstance(_pointer, triton.JITFunction))


@triton.jit
def _float64_of_bits(row):
    return tl.load(row + 3).to(tl.float64, bitcast=True)


@triton.jit
def _load(pointer, offsets, count, TAIL: tl.constexpr):
    if TAIL:
        return tl.load(pointer + offsets, mask=offsets < count, other=0.0)
    else:
        return tl.load(pointer + offsets)


@triton.jit
def _store(pointer, offsets, values, count, TAIL: tl.constexpr):
    if TAIL:
        tl.store(pointer + offsets, values, mask=offsets < count)
    else:
        tl.store(pointer + offsets, values)


@triton.jit
def _narrow(values, OUTPUT: tl.constexpr):
    """Round to nearest even, by way of float32 from float64 to 16 bits: both as PyTorch does."""
    if OUTPUT == tl.bfloat16:
        values = values.to(tl.float32)
        if INTERPRETED:
            # The interpreter truncates where the compiled kernel rounds, so here the rounding is
            # written out.
            bits = values.to(tl.int32, bitcast=True)
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            rounded = tl.where(values == values, rounded, 0x7FC0)
            return rounded.to(tl.int16).to(tl.bfloat16, bitcast=True)
        else:
            return values.to(tl.bfloat16)
    elif OUTPUT == tl.float16:
        return values.to(tl.float32).to(tl.float16)
    else:
        return values.to(OUTPUT)


@triton.jit
def _add_squares(squares, values):
    wide = values.to(tl.float64)
    return squares + wide * wide


@triton.jit
def _exponent_bits(values):
    """The exponent's bits, at the bottom of an int32: all set where a value is non-finite. No
    optimisation that assumes finite numbers can remove a test of bits."""
    if values.dtype == tl.float64:
        return (values.to(tl.int64, bitcast=True) >> 52).to(tl.int32) & 0x7FF
    else:
        return (values.to(tl.float32).to(tl.int32, bitcast=True) >> 23) & 0xFF


@triton.jit
def _add_result(squares, exponents, values):
    return _add_squares(squares, values), tl.maximum(exponents, _exponent_bits(values))


@triton.jit
def _store_partial(partials, chunk, squares_in, squares_result, exponents, WIDE: tl.constexpr):
    ALL_SET: tl.constexpr = 0x7FF if WIDE else 0xFF
    partial = partials + chunk.to(tl.int64) * PARTIAL_COLUMNS
    tl.store(partial, tl.sum(squares_in, 0))
    tl.store(partial + 1, tl.sum(squares_result, 0))
    tl.store(partial + 2, (tl.max(exponents, 0) == ALL_SET).to(tl.float64))


@triton.jit
def _accumulate_block(
    accumulators,
    gradients,
    scale,
    offsets,
    count,
    FIRST_WRITE: tl.constexpr,
    TAIL: tl.constexpr,
):
    incoming = _load(gradients, offsets, count, TAIL)
    result = incoming.to(scale.dtype) * scale
    if not FIRST_WRITE:
        result += _load(accumulators, offsets, count, TAIL)
    _store(accumulators, offsets, result, count, TAIL)
    if TAIL:
        # Beyond the end stand zeros, but zero times a non-finite scale is NaN.
        result = tl.where(offsets < count, result, 0.0)
    return incoming, result


@triton.jit
def scale_accumulate(
    table,
    partials,
    ACCUMULATOR: tl.constexpr,
    GRADIENT: tl.constexpr,
    FIRST_WRITE: tl.constexpr,
    STATISTICS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One chunk of accumulator += scale * gradient, or = on the first write.

    table: int64[chunks, 4]: accumulator address, gradient address, elements, bits of the scale.
    partials: float64[chunks, 4]: sum of squares of the gradient, of the result, 1.0 if non-finite.
    """
    chunk = tl.program_id(0)
    row = table + chunk.to(tl.int64) * TABLE_COLUMNS
    accumulators = _pointer(row, 0, ACCUMULATOR, ALIGNED)
    gradients = _pointer(row, 1, GRADIENT, ALIGNED)
    count = tl.load(row + 2).to(tl.int32)
    scale = _float64_of_bits(row).to(ACCUMULATOR)
    lanes = tl.arange(0, BLOCK)
    squares_in = tl.zeros([BLOCK], tl.float64)
    squares_result = tl.zeros([BLOCK], tl.float64)
    exponents = tl.zeros([BLOCK], tl.int32)

    whole = count // BLOCK * BLOCK
    start = 0
    while start < whole:
        incoming, result = _accumulate_block(
            accumulators, gradients, scale, start + lanes, count, FIRST_WRITE, False
        )
        if STATISTICS:
            squares_in = _add_squares(squares_in, incoming)
            squares_result, exponents = _add_result(squares_result, exponents, result)
        start += BLOCK
    if whole < count:
        incoming, result = _accumulate_block(
            accumulators, gradients, scale, whole + lanes, count, FIRST_WRITE, True
        )
        if STATISTICS:
            squares_in = _add_squares(squares_in, incoming)
            squares_result, exponents = _add_result(squares_result, exponents, result)
    if STATISTICS:
        _store_partial(
            partials, chunk, squares_in, squares_result, exponents, ACCUMULATOR == tl.float64
        )


@triton.jit
def gradient_statistics(
    table,
    partials,
    GRADIENT: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The statistics of one chunk of a gradient, which is incoming value and result in one.

    table: int64[chunks, 4]: (unused), gradient address, elements, (unused). partials: as above.
    """
    chunk = tl.program_id(0)
    row = table + chunk.to(tl.int64) * TABLE_COLUMNS
    gradients = _pointer(row, 1, GRADIENT, ALIGNED)
    count = tl.load(row + 2).to(tl.int32)
    lanes = tl.arange(0, BLOCK)
    squares = tl.zeros([BLOCK], tl.float64)
    exponents = tl.zeros([BLOCK], tl.int32)

    whole = count // BLOCK * BLOCK
    start = 0
    while start < whole:
        values = _load(gradients, start + lanes, count, False)
        squares, exponents = _add_result(squares, exponents, values)
        start += BLOCK
    if whole < count:
        values = _load(gradients, whole + lanes, count, True)
        squares, exponents = _add_result(squares, exponents, values)
    _store_partial(partials, chunk, squares, squares, exponents, GRADIENT == tl.float64)


@triton.jit(do_not_specialize=["chunks"], do_not_specialize_on_alignment=["statistics"])
def add_statistics(partials, statistics, chunks, BLOCK: tl.constexpr):
    """statistics += the partial results of all chunks, by one program and in one fixed order, so
    that the same tensors always give the same bits.

    partials: float64[chunks, 4]. statistics: float64[3], [2] being a flag that is never cleared.
    """
    sum_in = tl.load(statistics)
    sum_result = tl.load(statistics + 1)
    flag = tl.load(statistics + 2)
    lanes = tl.arange(0, BLOCK)
    squares_in = tl.zeros([BLOCK], tl.float64)
    squares_result = tl.zeros([BLOCK], tl.float64)
    non_finite = tl.zeros([BLOCK], tl.float64)
    start = 0
    while start < chunks:
        index = start + lanes
        partial = partials + index.to(tl.int64) * PARTIAL_COLUMNS
        squares_in += tl.load(partial, mask=index < chunks, other=0.0)
        squares_result += tl.load(partial + 1, mask=index < chunks, other=0.0)
        non_finite = tl.maximum(non_finite, tl.load(partial + 2, mask=index < chunks, other=0.0))
        start += BLOCK
    tl.store(statistics, sum_in + tl.sum(squares_in, 0))
    tl.store(statistics + 1, sum_result + tl.sum(squares_result, 0))
    tl.store(statistics + 2, tl.maximum(flag, tl.max(non_finite, 0)))


@triton.jit
def _finalise_block(
    outputs, accumulators, coefficient, offsets, count, OUTPUT: tl.constexpr, TAIL: tl.constexpr
):
    values = _load(accumulators, offsets, count, TAIL) * coefficient
    _store(outputs, offsets, _narrow(values, OUTPUT), count, TAIL)


@triton.jit(do_not_specialize_on_alignment=["scale", "norm"])
def finalise(
    table,
    scale,
    norm,
    OUTPUT: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    CLIP: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One chunk of output = accumulator * scale, times min(1, max_norm / (norm + 1e-6)) with CLIP.

    table: int64[chunks, 4]: output address, accumulator address, elements, bits of max_norm.
    scale and norm: one float64 each; norm is read only with CLIP. output and accumulator may be one
    tensor.
    """
    row = table + tl.program_id(0).to(tl.int64) * TABLE_COLUMNS
    outputs = _pointer(row, 0, OUTPUT, ALIGNED)
    accumulators = _pointer(row, 1, ACCUMULATOR, ALIGNED)
    count = tl.load(row + 2).to(tl.int32)
    coefficient = tl.load(scale)
    if CLIP:
        ratio = _float64_of_bits(row) / (tl.load(norm) + 1e-6)
        # Not tl.minimum: a NaN norm must stay NaN, or a broken gradient would look like a clipped
        # one.
        coefficient *= tl.where(ratio > 1.0, 1.0, ratio)
    coefficient = coefficient.to(ACCUMULATOR)
    lanes = tl.arange(0, BLOCK)

    whole = count // BLOCK * BLOCK
    start = 0
    while start < whole:
        _finalise_block(outputs, accumulators, coefficient, start + lanes, count, OUTPUT, False)
        start += BLOCK
    if whole < count:
        _finalise_block(outputs, accumulators, coefficient, whole + lanes, count, OUTPUT, True)
