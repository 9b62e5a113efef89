"""Random numbers of one step: the same for the same seed, and apart for every micro-batch."""

from __future__ import annotations

from types import TracebackType

import torch

from ..generators import default_generators

_MASK = (1 << 64) - 1


class StepRandomness:
    """A context that takes one number from torch's generator and, when left, has taken no other.

    So a step moves the generator on by the same distance however its batch is split and whatever its
    model draws. Left by an exception, it has not moved it at all.

    Attributes:
        seed: of this step, 63 bits.
        generators: torch's default ones of the CPU and of the device.
    """

    def __init__(self, device: torch.device) -> None:
        self.generators = default_generators([device])

    def __enter__(self) -> StepRandomness:
        self._before = [generator.get_state() for generator in self.generators]
        try:
            self.seed = int(torch.randint(2**63 - 1, ()))
        except BaseException:
            self._set(self._before)
            raise
        self._after = [generator.get_state() for generator in self.generators]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._set(self._after if error is None else self._before)

    def _set(self, states: list[torch.Tensor]) -> None:
        for generator, state in zip(self.generators, states, strict=True):
            generator.set_state(state)

    def begin_micro_batch(self, first_sample: int) -> None:
        """Seeds what the model draws by itself for the micro-batch that begins with this sample."""
        seed = _scramble(self.seed ^ _scramble(first_sample + 1))
        for generator in self.generators:
            generator.manual_seed(seed)


def _scramble(value: int) -> int:
    """SplitMix64 (Steele, Lea and Flood 2014): neighbouring numbers become unrelated ones."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
