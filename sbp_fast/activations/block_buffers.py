"""The buffers of a block that is computed twice: the second time changes nothing, and starts alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

# Larger ones are tables (a causal mask, positions), not what forward passes change.
_LARGEST_BYTES = 1 << 20


class BlockBuffers:
    """The buffers of some modules as they are when this object is made.

    Batch norm counts in them, spectral norm goes on from them: without this, a block that is computed
    again would count twice, and compute something else the second time.

    Args:
        modules: those whose own buffers are meant.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = modules
        self._registered = [dict(module._buffers) for module in modules]
        self._buffers = list(
            {
                id(buffer): buffer
                for buffers in self._registered
                for buffer in buffers.values()
                if buffer is not None and _may_change(buffer)
            }.values()
        )
        self._contents = [buffer.detach().clone() for buffer in self._buffers]

    def put_back(self) -> None:
        for module, buffers in zip(self._modules, self._registered, strict=True):
            for name, buffer in buffers.items():
                if module._buffers.get(name) is not buffer:
                    module._buffers[name] = buffer
        if self._buffers:
            # ``.data``: in the end nothing has changed, and autograd need not think so.
            torch._foreach_copy_([buffer.data for buffer in self._buffers], self._contents)

    @contextmanager
    def for_a_while(self) -> Iterator[None]:
        """While inside, the buffers are as they were; then again as they are now."""
        now = BlockBuffers(self._modules)
        self.put_back()
        try:
            yield
        finally:
            now.put_back()


def _may_change(buffer: Tensor) -> bool:
    return (
        buffer.layout is torch.strided
        and not buffer.is_inference()
        and buffer.nbytes <= _LARGEST_BYTES
        and 0 not in buffer.stride()
    )
