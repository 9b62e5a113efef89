"""What a step must put back when it does not complete: ``p.grad``, the modules' buffers, and torch's
random numbers."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

from torch import Tensor, nn

from .buffers import Buffers
from .generators import default_generators


class Transaction:
    """A context that begins by clearing ``p.grad`` and, left by an exception, changes nothing.

    Gradients are set aside, not copied: nobody writes to them during the step. Buffers (running
    statistics, say) are copied, into memory kept from step to step.

    Args:
        modules: the buffers of these and of all modules below them are put back, as are the names
            under which they are registered. Modules may come and go between steps.
        parameters: whose ``.grad`` is set aside.

    Attributes:
        buffers: as they were at the beginning.
    """

    def __init__(self, modules: Sequence[nn.Module], parameters: Sequence[Tensor]) -> None:
        self._parameters = parameters
        self.buffers = Buffers(modules)
        self._gradients: list[Tensor | None] = []
        self._generators = default_generators({parameter.device for parameter in parameters})
        self._random_states: list[Tensor] = []

    def __enter__(self) -> Transaction:
        self.buffers.copy()
        self._random_states = [generator.get_state() for generator in self._generators]
        self._gradients = [parameter.grad for parameter in self._parameters]
        self.clear_gradients()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is not None:
            self.roll_back()
            for generator, state in zip(self._generators, self._random_states, strict=True):
                generator.set_state(state)
        self.buffers.forget()
        self._gradients = []

    def clear_gradients(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    def roll_back(self) -> None:
        """Puts gradients and buffers back as they were at the beginning."""
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient
        self.buffers.put_back()

    def start_over(self) -> None:
        """As after the beginning: no gradients, and the buffers that there were."""
        self.clear_gradients()
        self.buffers.put_back()
