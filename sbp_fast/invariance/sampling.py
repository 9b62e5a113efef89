"""The random side of a step: whose turn it is, and what its random numbers depend on."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from .dropout import Draws, PerSampleDropout
from .layout import Layouts
from .randomness import StepRandomness


class Sampling:
    """A context around the forward and backward passes of one large batch.

    Args:
        modules: of the step.
        device: of the computation.
        layouts: where samples are, for dropout per sample; None for the model's own dropout.
        reseed: whether each micro-batch must be able to draw the same numbers again. Dropout per sample
            has that anyway.
        backend: of the kernels.

    Attributes:
        current: the micro-batch that runs.
        generators: those of which every micro-batch has its own state; none where torch's go on.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        device: torch.device,
        layouts: Layouts | None,
        *,
        reseed: bool,
        backend: str,
    ) -> None:
        self.current: Draws | None = None
        self.generators: list[torch.Generator] = []
        self._modules = modules
        self._device = device
        self._layouts = layouts
        self._reseed = reseed
        self._backend = backend
        self._randomness: StepRandomness | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Sampling:
        if self._reseed or self._layouts is not None:
            self._randomness = self._stack.enter_context(StepRandomness(self._device))
            self.generators = self._randomness.generators
            if self._layouts is not None:
                self._stack.enter_context(
                    PerSampleDropout(
                        self._modules,
                        self._randomness.seed,
                        lambda: self.current,
                        self._layouts,
                        self._backend,
                    )
                )
        return self

    def __exit__(self, *error: Any) -> None:
        self.current = None
        self._stack.__exit__(*error)

    def end(self) -> None:
        """No micro-batch runs: what is computed until the next begins (by a stream, to make it) is not
        the step's."""
        self.current = None

    def begin(self, first_sample: int, samples: int) -> None:
        """A micro-batch begins its forward pass; for the second time, it draws the same again."""
        self.current = Draws(first_sample, samples)
        if self._randomness is not None:
            self._randomness.begin_micro_batch(first_sample)
