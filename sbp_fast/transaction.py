"""What a step must put back when it does not complete: ``p.grad`` and the model's buffers."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

import torch
from torch import Tensor, nn
from torch.nn import Parameter


class Transaction:
    """A context that begins by clearing ``p.grad`` and, left by an exception, changes nothing.

    Gradients are set aside, not copied: nobody writes to them during the step. Buffers (running
    statistics, say) are copied, into memory kept from step to step, and only when they have changed
    since the last copy.
    """

    def __init__(self, model: nn.Module, parameters: Sequence[Parameter]) -> None:
        self._owners = [module for module in model.modules() if module._buffers]
        self._parameters = parameters
        self._copies: dict[tuple[nn.Module, str], _BufferCopy] = {}
        self._gradients: list[Tensor | None] = []

    def __enter__(self) -> Transaction:
        for module in self._owners:
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    self._copy(module, name, buffer)
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
        self._gradients = []

    def clear_gradients(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    def roll_back(self) -> None:
        """Puts gradients and buffers back as they were at the beginning."""
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient
        for (module, name), copy in self._copies.items():
            module._buffers[name] = copy.buffer
            if copy.version != copy.buffer._version:
                copy.give_back()

    def _copy(self, module: nn.Module, name: str, buffer: Tensor) -> None:
        copy = self._copies.get((module, name))
        if copy is None or copy.buffer is not buffer:
            self._copies[module, name] = _BufferCopy(buffer)
        elif copy.version != buffer._version:
            copy.take()


class _BufferCopy:
    """A buffer, its contents at some time, and its version then."""

    def __init__(self, buffer: Tensor) -> None:
        self.buffer = buffer
        self.contents = buffer.detach().clone()
        self.version = buffer._version

    @torch.no_grad()
    def take(self) -> None:
        self.contents.copy_(self.buffer)
        self.version = self.buffer._version

    @torch.no_grad()
    def give_back(self) -> None:
        self.buffer.copy_(self.contents)
        self.version = self.buffer._version
