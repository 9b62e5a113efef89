"""The buffers of modules (running statistics, say): copied at some time, and put back."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .parameters import modules_below

# A dense buffer up to this size is copied at every step. A larger one (a causal mask, a queue), or a
# sparse one, only when its version says that it has changed. The version is not enough for all,
# because batch norm's kernels update running statistics without raising it.
_SMALL_BYTES = 1 << 20


class Buffers:
    """The buffers of modules and of all modules below them, and the names that they are registered by.

    Copies stay in memory that is kept from time to time. Modules may come and go in between.

    Args:
        earlier: has copies of large buffers that serve as well for as long as those do not change.
    """

    def __init__(self, modules: Sequence[nn.Module], earlier: Buffers | None = None) -> None:
        self._roots = modules
        self._earlier = earlier
        self._registered: list[tuple[nn.Module, dict[str, Tensor | None]]] = []
        self._copies: dict[int, _BufferCopy] = {}

    def copy(self) -> None:
        self._registered = [
            (module, dict(module._buffers)) for module in modules_below(self._roots)
        ]
        copies: dict[int, _BufferCopy] = {}
        earlier = {} if self._earlier is None else self._earlier._copies
        small: list[_BufferCopy] = []
        others: list[_BufferCopy] = []
        for _, buffers in self._registered:
            for buffer in buffers.values():
                if buffer is None or id(buffer) in copies:
                    continue
                before = earlier.get(id(buffer))
                if before is not None and not before.may_differ():
                    copies[id(buffer)] = before
                    continue
                copy = self._copies.get(id(buffer))
                if copy is None or copy is before or copy.is_resized():
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

    def forget(self) -> None:
        """Lets go of the modules; the copies' memory stays."""
        self._registered = []

    def put_back(self) -> None:
        """Contents and names as they were at the last :meth:`copy`.

        Warns of a buffer whose contents could not be put back: an error would hide the one that
        ended the step.
        """
        for module, buffers in self._registered:
            # Scripted modules refuse to change names, which they cannot have changed either.
            if not _same_buffers(dict(module._buffers), buffers):
                # In one go, for their order: it is the order of the state dict.
                module._buffers.clear()
                module._buffers.update(buffers)
        for copy in self._copies.values():
            if copy.may_differ():
                copy.put_back()


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
