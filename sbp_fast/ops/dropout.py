"""Dropout whose mask is a function of the sample, not of the order in which samples are computed."""

from __future__ import annotations

from torch import Tensor

from .backends import operator


def dropout(
    input: Tensor,
    probability: float,
    *,
    seed: int,
    call: int,
    first_sample: int,
    samples: int,
    outer: int = 1,
    backend: str = "auto",
) -> Tensor:
    """``input * keep / (1 - probability)``; ``keep`` is 0 with ``probability``, else 1.

    Elements are multiplied with 0 or ``1 / (1 - probability)``, as
    :func:`torch.nn.functional.dropout` does on the CPU: an infinite or NaN element that is dropped
    becomes NaN, with a probability of 1 as well. Products of bfloat16 and float16 are rounded once, from
    float32. A probability of 0 copies.

    ``keep`` comes from Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2,
    3"): key ``seed``, counter ``(element // 4, call, sample)`` of 32, 32 and 64 bits, word
    ``element % 4``; dropped where that word is below ``probability * 2**32``. So equal arguments give
    equal masks on every backend, and it is its own backward pass: the gradient of the input is
    ``dropout(grad_output)``. Nothing is stored between the two.

    Args:
        input: float32, float64, bfloat16 or float16, read as shape ``(outer, samples, inner)`` in its
            logical order, whatever its strides. ``element = outer_index * inner + inner_index``, of
            which a sample has at most ``2**34``.
        probability: of a zero, from 0 to 1.
        seed: of 64 bits; negative ones count from above, as in two's complement.
        call: which call of a step this is, from 0 to ``2**32 - 1``.
        first_sample: the index in the large batch of this micro-batch's first sample, 0 or more.
        samples: in this micro-batch.
        outer: the product of the dimensions before the samples' own: 1 where samples come first.
        backend: as in :func:`sbp_fast.ops.scale_accumulate_`.

    Returns:
        A new tensor of the input's dtype, with the strides of ``torch.empty_like(input)``.

    Raises:
        RuntimeError, ValueError, BackendUnavailableError: as :func:`sbp_fast.ops.scale_accumulate_`.
    """
    op = operator("dropout", backend, input.device.type)
    result: Tensor = op(input, seed, call, first_sample, outer, samples, probability)
    return result
