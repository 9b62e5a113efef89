"""The dropout op in plain PyTorch: its meaning, and the fallback where nothing faster exists."""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks_dropout as checks
from .schemas import library

_LOW = 0xFFFFFFFF
# Philox4x32-10, Salmon et al. 2011, table 2.
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def dropout(
    input: Tensor,
    seed: int,
    call: int,
    first_sample: int,
    outer: int,
    samples: int,
    probability: float,
) -> Tensor:
    result = checks.fake_dropout(input, seed, call, first_sample, outer, samples, probability)
    if probability == 0.0 or input.numel() == 0:
        return result.copy_(input)
    inner = input.numel() // (outer * samples)
    per_sample = outer * inner
    device = input.device
    words = _philox(
        seed,
        torch.arange((per_sample + 3) // 4, device=device),
        call,
        torch.arange(first_sample, first_sample + samples, device=device)[:, None],
    )
    words = words.reshape(samples, -1)[:, :per_sample]
    keep = words >= round(probability * 2**32)
    keep = keep.reshape(samples, outer, inner).transpose(0, 1).reshape(input.shape)
    wide = wide_dtype(input.dtype)
    # A product, so that what is not finite stays so; and rounded once, to the input's dtype.
    return result.copy_(input.to(wide) * (keep.to(wide) * scale_of(probability, wide)))


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What products are computed in: it holds the narrow dtypes exactly."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def scale_of(probability: float, wide: torch.dtype) -> float:
    """``1 / (1 - probability)`` as torch has it: what divides is rounded before; 0 if all is dropped."""
    if probability == 1.0:
        return 0.0
    scale: float = (1.0 / torch.tensor(1.0 - probability, dtype=wide)).item()
    return scale


def _philox(seed: int, element: Tensor, call: int, sample: Tensor) -> Tensor:
    """Words of shape ``(samples, elements, 4)``, in int64."""
    shape = torch.broadcast_shapes(element.shape, sample.shape)
    counter = [
        element.expand(shape),
        torch.full_like(element, call).expand(shape),
        (sample & _LOW).expand(shape),
        (sample >> 32 & _LOW).expand(shape),
    ]
    key = [seed & _LOW, seed >> 32 & _LOW]
    for _ in range(_ROUNDS):
        high_0, low_0 = _multiply(_MULTIPLIERS[0], counter[0])
        high_1, low_1 = _multiply(_MULTIPLIERS[1], counter[2])
        counter = [high_1 ^ counter[1] ^ key[0], low_1, high_0 ^ counter[3] ^ key[1], low_0]
        key = [(k + step) & _LOW for k, step in zip(key, _KEY_STEPS, strict=True)]
    return torch.stack(counter, dim=-1)


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of the product of 32-bit numbers, by halves: int64 has no room for it."""
    low = a * (b & 0xFFFF)
    high = a * (b >> 16) + (low >> 16)
    return high >> 16, (high & 0xFFFF) << 16 | low & 0xFFFF


library.impl("dropout.reference", dropout, "CompositeExplicitAutograd")
