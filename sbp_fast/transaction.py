"""What a step must put back when it does not complete: ``p.grad`` and the modules' buffers."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from types import TracebackType

import torch
from torch import Tensor, nn

from .parameters import modules_below

# A dense buffer up to this size is copied at every step. A larger one (a causal mask, a queue), or a
# sparse one, only when its version says that it has changed. The version is not enough for all,
# because batch norm's kernels update running statistics without raising it.
_SMALL_BYTES = 1 << 20


class Transaction:
    """A context that begins by clearing ``p.grad`` and, left by an exception, changes nothing.

    Gradients are set aside, not copied: nobody writes to them during the step. Buffers (running
    statistics, say) are copied, into memory kept from step to step.

    Args:
        modules: the buffers of these and of all modules below them are put back, as are the names
            under which they are registered. Modules may come and go between steps.
        parameters: whose ``.grad`` is set aside.
    """

    def __init__(self, modules: Sequence[nn.Module], parameters: Sequence[Tensor]) -> None:
        self._roots = modules
        self._parameters = parameters
        self._registered: list[tuple[nn.Module, dict[str, Tensor | None]]] = []
        self._copies: dict[int, _BufferCopy] = {}
        self._gradients: list[Tensor | None] = []

    def __enter__(self) -> Transaction:
        self._registered = [
            (module, dict(module._buffers)) for module in modules_below(self._roots)
        ]
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
        self._registered, self._gradients = [], []

    def clear_gradients(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    def roll_back(self) -> None:
        """Puts gradients and buffers back as they were at the beginning.

        Warns of a buffer whose contents could not be put back: an error would hide the one that
        ended the step.
        """
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient
        self.put_buffers_back()

    def put_buffers_back(self) -> None:
        """Puts the buffers back alone."""
        for module, buffers in self._registered:
            # Scripted modules refuse to change names, which they cannot have changed either.
            if not _same_buffers(dict(module._buffers), buffers):
                # In one go, for their order: it is the order of the state dict.
                module._buffers.clear()
                module._buffers.update(buffers)
        for copy in self._copies.values():
            if copy.may_differ():
                copy.put_back()

    def _copy_buffers(self) -> None:
        copies: dict[int, _BufferCopy] = {}
        small: list[_BufferCopy] = []
        others: list[_BufferCopy] = []
        for _, buffers in self._registered:
            for buffer in buffers.values():
                if buffer is None or id(buffer) in copies:
                    continue
                copy = self._copies.get(id(buffer))
                if copy is None or copy.is_resized():
                    copy = _BufferCopy(buffer)
                elif copy.is_small:
                    small.append(copy)
                elif copy.may_differ():
                    others.append(copy)
                copies[id(buffer)] = copy
        # In a call of their own: it is fast where all are on one device, and copies of others are not.
        _copy_all([copy.contents for copy in small], [copy.memory for copy in small])
        for copy in others:
            _copy_all([copy.contents], [copy.memory])
            copy.version = _version(copy.buffer)
        self._copies = copies


class _BufferCopy:
    """A buffer, its contents at some time, and its version then."""

    # A copy made in inference mode could never be written to outside of it.
    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(self, buffer: Tensor) -> None:
        self.buffer = buffer  # held, so that no other tensor gets its id
        self.memory = _without_repeats(buffer)
        self.shape = self.memory.shape
        self.is_small = buffer.layout is torch.strided and self.memory.nbytes <= _SMALL_BYTES
        # A large copy waits in host memory: the device's is what this package is here to spare.
        to_host = self.memory.is_cuda and not self.is_small
        self.contents = self.memory.cpu() if to_host else self.memory.clone()
        self.version = _version(buffer)

    def may_differ(self) -> bool:
        return self.is_small or self.version != _version(self.buffer) or self.is_resized()

    def is_resized(self) -> bool:
        return self.memory.shape != self.shape

    def put_back(self) -> None:
        try:
            if self.is_resized():
                self.buffer.data = self.contents.to(self.buffer.device, copy=True)
            else:
                _copy_all([self.memory], [self.contents])
            self.version = _version(self.buffer)
        except RuntimeError as error:
            shape = tuple(self.shape)
            message = (
                f"a buffer of shape {shape} was not put back after an incomplete step: {error}"
            )
            warnings.warn(message, stacklevel=2)


def _same_buffers(left: dict[str, Tensor | None], right: dict[str, Tensor | None]) -> bool:
    """The same tensors by the same names in the same order."""
    return list(left) == list(right) and all(left[name] is right[name] for name in right)


def _without_repeats(tensor: Tensor) -> Tensor:
    """A view of each element once: an expanded tensor cannot be written to."""
    if tensor.layout is not torch.strided or 0 not in tensor.stride():
        return tensor
    sizes = [
        min(size, 1) if stride == 0 else size
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    ]
    return tensor.as_strided(sizes, tensor.stride())


def _version(tensor: Tensor) -> int:
    """Inference tensors have none: a large one counts as constant, as it is outside inference mode."""
    return 0 if tensor.is_inference() else tensor._version


# Inference mode lets inference tensors be written to, and others as well.
@torch.inference_mode()
def _copy_all(targets: list[Tensor], sources: list[Tensor]) -> None:
    if targets:
        torch._foreach_copy_(targets, sources)
