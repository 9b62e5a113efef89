"""What a step must put back when it does not complete: ``p.grad`` and the model's buffers."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

import torch
from torch import Tensor, nn
from torch.nn import Parameter

# A buffer up to this size is copied at every step. Above it (a causal mask, a queue) only when its
# version says that it has changed. The version is not enough for all, because batch norm's kernels
# update running statistics without raising it.
_SMALL_BYTES = 1 << 20


class Transaction:
    """A context that begins by clearing ``p.grad`` and, left by an exception, changes nothing.

    Gradients are set aside, not copied: nobody writes to them during the step. Buffers (running
    statistics, say) are copied, into memory kept from step to step.
    """

    def __init__(self, model: nn.Module, parameters: Sequence[Parameter]) -> None:
        self._owners = [module for module in model.modules() if module._buffers]
        self._parameters = parameters
        self._copies: dict[tuple[nn.Module, str], _BufferCopy] = {}
        self._gradients: list[Tensor | None] = []

    def __enter__(self) -> Transaction:
        self._copy_buffers()
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
        changed = [copy for copy in self._copies.values() if copy.may_differ()]
        _copy_all([copy.buffer for copy in changed], [copy.contents for copy in changed])
        for copy in changed:
            copy.version = copy.buffer._version

    def _copy_buffers(self) -> None:
        stale = []
        for module in self._owners:
            for name, buffer in module._buffers.items():
                if buffer is None:
                    continue
                copy = self._copies.get((module, name))
                if copy is None or copy.buffer is not buffer:
                    self._copies[module, name] = _BufferCopy(buffer)
                elif copy.may_differ():
                    stale.append(copy)
                    copy.version = buffer._version
        _copy_all([copy.contents for copy in stale], [copy.buffer for copy in stale])


class _BufferCopy:
    """A buffer, its contents at some time, and its version then."""

    def __init__(self, buffer: Tensor) -> None:
        self.buffer = buffer
        self.contents = buffer.detach().clone()
        self.version = buffer._version

    def may_differ(self) -> bool:
        return self.buffer.nbytes <= _SMALL_BYTES or self.version != self.buffer._version


@torch.no_grad()
def _copy_all(targets: list[Tensor], sources: list[Tensor]) -> None:
    if targets:
        torch._foreach_copy_(targets, sources)
