"""The ``.triton`` overload of dropout. Importable everywhere; Triton itself is imported at first use."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from . import checks_dropout as checks
from .reference_dropout import scale_of, wide_dtype
from .schemas import library
from .triton_backend import _DTYPES, _kernels_for, _on, _triton_dtype

_MOST_INT32 = 2**31 - 1


def dropout(
    input: Tensor,
    seed: int,
    call: int,
    first_sample: int,
    outer: int,
    samples: int,
    probability: float,
) -> Tensor:
    """See :func:`sbp_fast.ops.dropout`. Whatever is not contiguous is copied first.

    Raises:
        RuntimeError: what ``checks_dropout`` refuses; tensors out of Triton's reach.
    """
    result = checks.fake_dropout(input, seed, call, first_sample, outer, samples, probability)
    if probability == 0.0 or input.numel() == 0:
        return result.copy_(input)
    shared = _kernels_for("dropout", input.device)
    from . import triton_dropout_kernels as kernels

    with _on(input.device):
        source = input.contiguous()
        target = result if result.is_contiguous() else torch.empty_like(source)
        inner = input.numel() // (outer * samples)
        threshold = round(probability * 2**32)
        # Where every word drops, which no threshold of 32 bits says, a factor of zero does.
        scale = scale_of(probability, wide_dtype(input.dtype)) if threshold < 2**32 else 0.0
        kernels.dropout[(-(-input.numel() // kernels.BLOCK),)](
            target,
            source,
            input.numel(),
            inner,
            samples,
            first_sample,
            _as_int32(call),
            _as_int32(seed),
            _as_int32(seed >> 32),
            _as_int32(threshold),
            int(np.float64(scale).view(np.int64)),
            T=_triton_dtype(shared, _DTYPES.index(input.dtype)),
            INT64=input.numel() > _MOST_INT32 - kernels.BLOCK,
            GROUPED=inner % 4 == 0,
            BLOCK=kernels.BLOCK,
            **kernels.COMPILER_OPTIONS,
        )
        return result if target is result else result.copy_(target)


def _as_int32(word: int) -> int:
    """The number of the same lowest 32 bits: kernels take all words as one type."""
    return (word + 2**31) % 2**32 - 2**31


library.impl("dropout.triton", dropout, "CompositeExplicitAutograd")
