# Compile-time arguments are in capitals, as everywhere in Triton, which has no types to annotate with.
# ruff: noqa: N803, N806, SIM300
# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator"
"""The Triton kernel of dropout. Import only where Triton is installed; ``triton_dropout`` launches it."""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_kernels import BLOCK, COMPILER_OPTIONS, _load, _narrow, _store

__all__ = ["BLOCK", "COMPILER_OPTIONS", "dropout"]

# Philox4x32-10: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", table 2.
_MULTIPLIER_0 = tl.constexpr(0xD2511F53)
_MULTIPLIER_1 = tl.constexpr(0xCD9E8D57)
_KEY_STEP_0 = tl.constexpr(0x9E3779B9)
_KEY_STEP_1 = tl.constexpr(0xBB67AE85)
_ROUNDS = tl.constexpr(10)


@triton.jit
def _philox(c0, c1, c2, c3, key_0, key_1):
    """Four words of uint32 for four; the first ones are a tensor."""
    for _ in tl.static_range(_ROUNDS):
        before_0, before_2 = c0, c2
        c0 = tl.umulhi(_MULTIPLIER_1, before_2) ^ c1 ^ key_0
        c1 = tl.mul(_MULTIPLIER_1, before_2, sanitize_overflow=False)
        c2 = tl.umulhi(_MULTIPLIER_0, before_0) ^ c3 ^ key_1
        c3 = tl.mul(_MULTIPLIER_0, before_0, sanitize_overflow=False)
        key_0 = tl.add(key_0, _KEY_STEP_0, sanitize_overflow=False)
        key_1 = tl.add(key_1, _KEY_STEP_1, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def _noise(at, inner, samples, first_sample, call, key_0, key_1):
    """The block of noise of each position in contiguous memory, and the element's index in its sample."""
    row = at // inner
    outer = row // samples
    element = outer * inner + (at - row * inner)
    sample = first_sample + (row - outer * samples).to(tl.int64)
    group = (element // 4).to(tl.uint32)
    call = tl.zeros_like(group) + call
    low = (sample & 0xFFFFFFFF).to(tl.uint32)
    high = (sample >> 32).to(tl.uint32)
    w0, w1, w2, w3 = _philox(group, call, low, high, key_0, key_1)
    return w0, w1, w2, w3, element


@triton.jit
def _drop_block(outputs, inputs, factors, offsets, count, T: tl.constexpr, TAIL: tl.constexpr):
    values = _load(inputs, offsets, count, TAIL).to(factors.dtype)
    _store(outputs, offsets, _narrow(values * factors, T), count, TAIL)


@triton.jit(
    do_not_specialize=[
        *("numel", "inner", "samples", "first_sample", "call", "seed_low", "seed_high"),
        *("threshold", "scale_bits"),
    ]
)
def dropout(
    outputs,
    inputs,
    numel,
    inner,
    samples,
    first_sample,
    call,
    seed_low,
    seed_high,
    threshold,
    scale_bits,
    T: tl.constexpr,
    INT64: tl.constexpr,
    GROUPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of contiguous memory, which is rows of ``inner`` elements; samples take turns.

    outputs, inputs: T[numel]. The 32-bit words call, seed_low, seed_high and threshold are int32 of
    the same bits; scale_bits are those of a float64. ``GROUPED``: four divides ``inner``, so that
    four neighbours share a block of noise; else each element takes a word of a block of its own.
    ``INT64``: positions need it.
    """
    INDEX: tl.constexpr = tl.int64 if INT64 else tl.int32
    WIDE: tl.constexpr = tl.float64 if T == tl.float64 else tl.float32
    start = tl.program_id(0).to(INDEX) * BLOCK
    inner = inner.to(INDEX)
    samples = samples.to(INDEX)
    first_sample = first_sample.to(tl.int64)
    call = call.to(tl.uint32)
    key_0 = seed_low.to(tl.uint32)
    key_1 = seed_high.to(tl.uint32)
    if GROUPED:
        at = start + tl.arange(0, BLOCK // 4) * 4
        w0, w1, w2, w3, _ = _noise(at, inner, samples, first_sample, call, key_0, key_1)
        words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    else:
        at = start + tl.arange(0, BLOCK)
        w0, w1, w2, w3, element = _noise(at, inner, samples, first_sample, call, key_0, key_1)
        even = tl.where(element & 2 == 0, w0, w2)
        odd = tl.where(element & 2 == 0, w1, w3)
        words = tl.where(element & 1 == 0, even, odd)
    scale = scale_bits.to(tl.int64).to(tl.float64, bitcast=True).to(WIDE)
    # Not a choice among products: what is not finite stays so, as in torch.
    factors = tl.where(words < threshold.to(tl.uint32), 0.0, scale).to(WIDE)
    offsets = start + tl.arange(0, BLOCK)
    if start + BLOCK <= numel:
        _drop_block(outputs, inputs, factors, offsets, numel, T, False)
    else:
        _drop_block(outputs, inputs, factors, offsets, numel, T, True)
