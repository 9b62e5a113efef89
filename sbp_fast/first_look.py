"""The first look at a large batch: what can be checked on a few samples before anything is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain

import torch

from .batches import MicroBatch, first_samples
from .forward import Forward
from .parameters import modules_below, modules_of
from .streaming import moved

# Odd, so that parts differ in size, and enough for parts of more than one sample: a loss may be
# undefined for a single one (a standard deviation) or see another shape (after .squeeze()).
_MOST, _LEAST = 5, 2

Check = Callable[[Forward, MicroBatch, torch.device], None]


class FirstLook:
    """Shows a few samples to checks: once, at the first large batch that begins with at least two; and
    again where layers have changed between training and evaluation.

    Args:
        checks: each takes the forward, 2 to 5 samples as the model sees them, and the device. It raises
            where something is wrong; the next large batch is then looked at again.
    """

    def __init__(self, checks: Iterable[Check]) -> None:
        self._checks = list(checks)
        self._seen: tuple[bool, ...] | None = None

    def at(
        self, micro_batches: Iterable[MicroBatch], forward: Forward, device: torch.device
    ) -> Iterable[MicroBatch]:
        """The same micro-batches, after all checks have passed.

        Of a stream the first item is taken, and no more: a generator may fill its memory again.
        """
        if not self._checks:
            return micro_batches
        training = tuple(
            module.training for module in modules_below(modules_of(forward.model, forward.loss_fn))
        )
        if training == self._seen:
            return micro_batches
        if isinstance(micro_batches, list):
            first = micro_batches[0]
        else:
            rest = iter(micro_batches)
            first = next(rest)
            micro_batches = chain((first,), rest)
        samples = first_samples(first, _MOST)
        if samples.samples >= _LEAST:
            for check in self._checks:
                check(forward, moved(samples, device), device)
            self._seen = training
        return micro_batches
