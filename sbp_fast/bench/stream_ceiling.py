"""The ceiling: the memory bandwidth that simple loops reach on this machine.

On the CPU it is STREAM's (J. D. McCalpin, IEEE TCCA Newsletter, December 1995), compiled into the native
library, with two access patterns added: ``update`` and ``read``. Elsewhere, and without the library,
copies and additions by torch stand in, and rows name them as what they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops import availability, schemas
from .timing import Call

_FLOAT_BYTES = 4

# Kernel -> what one element moves: reads and writes of float32. None of the first four reads what it
# writes, so its stores need not fetch lines (STREAM counts the same).
FLOATS_MOVED = {
    "copy": 2,  # a = b
    "scale": 2,  # a = s * b
    "add": 3,  # a = b + c
    "triad": 3,  # a = b + s * c
    "update": 3,  # a += s * b
    "read": 1,  # b
}

# A piece of memory that a kernel of the native library works on begins and ends with a cache line.
_LINE_ELEMENTS = 16

# No public op, hence neither fakes nor overloads. Kept for as long as the process: a library that is
# collected takes its definitions with it.
_library = torch.library.Library(schemas.NAMESPACE, "FRAGMENT")
_library.define("_stream_kernel(Tensor(a!) a, Tensor b, Tensor c, float scale, str kernel) -> ()")


@dataclass(frozen=True)
class Ceiling:
    """A loop whose bandwidth is the measure of others."""

    name: str
    call: Call
    bytes: int


class Ceilings:
    """The loops on ``device``, over arrays of ``elements`` each, which they share."""

    def __init__(self, device: torch.device, elements: int) -> None:
        elements = max(_LINE_ELEMENTS, elements // _LINE_ELEMENTS * _LINE_ELEMENTS)
        self._elements = elements
        self._a = torch.ones(elements, device=device)
        self._b = torch.ones(elements, device=device)
        self._is_stream = device.type == "cpu" and availability("cpu").usable
        self._c = torch.ones(elements, device=device) if self._is_stream else self._b
        self._is_cuda = device.type == "cuda"

    def all(self) -> list[Ceiling]:
        """Every loop there is here, each once."""
        return list({ceiling.name: ceiling for ceiling in map(self.like, FLOATS_MOVED)}.values())

    def like(self, kernel: str) -> Ceiling:
        """The loop that moves memory as ``kernel``, one of :data:`FLOATS_MOVED`, does.

        Where STREAM is not at hand: on CUDA a copy for all of them, on the CPU a copy or, for
        ``update``, an addition; and a sum for ``read``.
        """
        if self._is_stream:
            return self._ceiling(f"STREAM {kernel}", kernel, self._stream(kernel))
        if kernel == "update" and not self._is_cuda:
            return self._ceiling("torch add_ (flat)", kernel, self._torch_update)
        if kernel == "read" and not self._is_cuda:
            return self._ceiling("torch sum (flat)", kernel, self._torch_read)
        return self._ceiling("torch copy_ (flat)", "copy", self._torch_copy)

    def _ceiling(self, name: str, kernel: str, call: Call) -> Ceiling:
        return Ceiling(name, call, self._elements * _FLOAT_BYTES * FLOATS_MOVED[kernel])

    def _stream(self, kernel: str) -> Call:
        op = torch.ops.sbp_fast._stream_kernel.default
        # Added up over thousands of calls, the arrays stay finite.
        return lambda _: op(self._a, self._b, self._c, 1e-6, kernel)

    def _torch_copy(self, _: int) -> Tensor:
        return self._a.copy_(self._b)

    def _torch_update(self, _: int) -> Tensor:
        return self._a.add_(self._b, alpha=1e-6)

    def _torch_read(self, _: int) -> Tensor:
        return self._b.sum()
