"""Dropout whose masks belong to the samples: the same for any split of the large batch.

While a step runs, the dropout functions of ``torch.nn.functional`` and the modules of stochastic depth
(as timm, torchvision and Transformers write it) take their masks from
:func:`sbp_fast.ops.dropout`: Philox, by the step's seed, the number of the call within the forward pass,
the sample's index in the large batch and the element within the sample.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from .intercept import answering, native
from .layout import Layouts, Site
from .sites import Names
from .stochastic_depth import STOCHASTIC_DEPTH, StochasticDepth, stochastic_depth_asks

# Klambauer et al. 2017, "Self-Normalizing Neural Networks": a dropped unit becomes -alpha'.
_ALPHA = 1.7580993408473766


@dataclass
class Draws:
    """One micro-batch: which samples it has, and the calls of dropout it has made so far."""

    first_sample: int
    samples: int
    # Of each call its number and site, by what it drew from torch's generator. A checkpoint puts the
    # generator back before it computes its part of the model again: that draws the same numbers.
    calls: dict[int, _Place] = field(default_factory=dict)
    occurrences: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class _Place:
    """A call's place in the forward pass."""

    number: int
    site: Site
    module: nn.Module | None


class PerSampleDropout:
    """A context in which dropout is per sample.

    Args:
        modules: of the step; stochastic depth is found among them.
        seed: of the step.
        whose: gives the micro-batch that runs; None where none does.
        layouts: where the samples are in what calls are given.
        backend: of the kernels.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        seed: int,
        whose: Callable[[], Draws | None],
        layouts: Layouts,
        backend: str,
    ) -> None:
        self.thread = threading.get_ident()
        self._seed = seed
        self._whose = whose
        self._layouts = layouts
        self._backend = backend
        self._names = Names(modules)
        self._modules = modules
        self._stack = ExitStack()

    def __enter__(self) -> PerSampleDropout:
        self._stack.enter_context(answering(self))
        self._stack.enter_context(stochastic_depth_asks(self._modules))
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    @property
    def answers(self) -> Mapping[str, Callable[..., Any]]:
        return {
            "dropout": self._dropout,
            "alpha_dropout": self._alpha_dropout,
            "feature_alpha_dropout": self._feature_alpha_dropout,
            "dropout1d": partial(self._feature_dropout, native("dropout1d"), 3),
            "dropout2d": partial(self._feature_dropout, native("dropout2d"), None),
            "dropout3d": partial(self._feature_dropout, native("dropout3d"), 5),
            STOCHASTIC_DEPTH: self._drop_paths,
        }

    def is_computing(self, in_autograd: bool) -> bool:
        return self._whose() is not None

    # What is asked for, with the functions' own signatures

    def _dropout(
        self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> Tensor:
        if not training or not 0.0 < p <= 1.0:
            output: Tensor = native("dropout")(input, p, training, inplace)
            return output
        if inplace:
            return input.mul_(self._mask(input, input.ndim, p))
        dropped: Tensor = PhiloxDropout.apply(  # type: ignore[no-untyped-call]
            input, *self._arguments(input, p)
        )
        return dropped

    def _feature_dropout(
        self,
        otherwise: Callable[..., Tensor],
        batched_dims: int | None,
        input: Tensor,
        p: float = 0.5,
        training: bool = True,
        inplace: bool = False,
    ) -> Tensor:
        """Whole channels. Input without a batch dimension is left to torch."""
        if not training or not 0.0 < p <= 1.0 or input.ndim != (batched_dims or input.ndim):
            return otherwise(input, p, training, inplace)
        mask = self._mask(input, 2, p)
        return input.mul_(mask) if inplace else input * mask

    def _alpha_dropout(
        self,
        input: Tensor,
        p: float = 0.5,
        training: bool = False,
        inplace: bool = False,
        mask_dims: int | None = None,
    ) -> Tensor:
        if not training or not 0.0 < p < 1.0:
            output: Tensor = native("alpha_dropout")(input, p, training, inplace)
            return output
        keep = (self._mask(input, mask_dims or input.ndim, p) != 0).to(input.dtype)
        # Scale and shift keep the mean at 0 and the variance at 1, as torch's own function does.
        scale = float((_ALPHA**2 * p + 1.0) * (1.0 - p)) ** -0.5
        shift = (keep - 1.0) * (_ALPHA * scale) + _ALPHA * scale * p
        output = input * (keep * scale) + shift
        return input.copy_(output) if inplace else output

    def _feature_alpha_dropout(
        self, input: Tensor, p: float = 0.5, training: bool = False, inplace: bool = False
    ) -> Tensor:
        return self._alpha_dropout(input, p, training, inplace, mask_dims=2)

    def _drop_paths(self, module: nn.Module, input: Tensor) -> Tensor:
        depth = StochasticDepth.of(module)
        assert depth is not None
        mask = self._mask(input, 1, depth.probability, of_all_samples=depth.whole_batch)
        return input * (mask if depth.scales else (mask != 0).to(input.dtype))

    # Masks

    def _mask(
        self, input: Tensor, dims: int, probability: float, of_all_samples: bool = False
    ) -> Tensor:
        """A mask over the first ``dims`` dimensions of the input, to be multiplied with it."""
        shape = (1,) if of_all_samples else input.shape[:dims]
        ones = torch.ones(shape, dtype=input.dtype, device=input.device)
        arguments = self._arguments(input, probability, ones, of_all_samples)
        return _drop(ones, *arguments).view(*ones.shape, *[1] * (input.ndim - ones.ndim))

    def _arguments(
        self,
        input: Tensor,
        probability: float,
        mask: Tensor | None = None,
        of_all_samples: bool = False,
    ) -> tuple[float, dict[str, Any]]:
        """Of the op: which mask this call has, by the layout of its input."""
        draws = self._whose()
        assert draws is not None
        place = self._place(draws)
        layout = self._layouts.of(place.site, place.module, input, draws.samples)
        shape = input.shape if mask is None else mask.shape
        has_samples = layout.dim is not None and not of_all_samples
        read_as = layout.outer_and_samples(shape, draws.samples) if has_samples else (1, 1)
        if read_as is None:
            raise ValueError(
                f"dropout in {place.site[0]!r} has a mask over the first {len(shape)} dimensions of a "
                f"tensor of shape {tuple(input.shape)}, but the samples are along dimension "
                f"{layout.dim}; use nn.Dropout there, or pass dropout='native'"
            )
        return probability, {
            "seed": self._seed,
            "call": place.number,
            "first_sample": draws.first_sample if has_samples else 0,
            "outer": read_as[0],
            "samples": read_as[1],
            "backend": self._backend,
        }

    def _place(self, draws: Draws) -> _Place:
        drawn = int(torch.randint(2**62, ()))
        if torch._C._current_graph_task_id() != -1:
            place = draws.calls.get(drawn)
            if place is None:
                raise RuntimeError(
                    f"dropout in {self._names.of_caller()[0]!r} is computed again in the backward pass "
                    "without the random numbers of the forward pass; leave preserve_rng_state=True in "
                    "torch.utils.checkpoint, or pass dropout='native'"
                )
            return place
        name, module = self._names.of_caller()
        place = _Place(len(draws.calls), (name, draws.occurrences[name]), module)
        draws.occurrences[name] += 1
        draws.calls[drawn] = place
        return place


class PhiloxDropout(torch.autograd.Function):
    """Keeps nothing: the mask is computed again, and the backward pass is the same function."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, probability: float, which: dict[str, Any]) -> Tensor:
        ctx.arguments = probability, which
        return _drop(input, probability, which)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        result: Tensor = PhiloxDropout.apply(gradient, *ctx.arguments)  # type: ignore[no-untyped-call]
        return result, None, None


def _drop(input: Tensor, probability: float, which: dict[str, Any]) -> Tensor:
    return ops.dropout(input, probability, **which)
