"""Counts what a step would need, on tensors that have no memory.

Under torch's ``FakeTensorMode`` operations compute shapes and layouts, and nothing else. Storages are
made, shared and freed as they would be, so the same count as of real tensors can be kept of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor

from .live_bytes import LiveBytes

_READ = torch.ops.aten._local_scalar_dense.default
_EQUAL = torch.ops.aten.equal.default
_DRAWS = (torch.ops.aten.randint.default, torch.ops.aten.randint.low)

# What torch's allocator on CUDA rounds up to.
CUDA_GRANULE = 512


class FakeLiveBytes(LiveBytes):
    """Counts fake tensors as :class:`LiveBytes` counts real ones. To be entered inside of a fake mode.

    Values are not there to be read. Where a step reads one all the same, it gets an answer that takes it
    on its usual way: a number is 1.0, a question is answered with ``yes``, whole numbers that are drawn
    are 0. A whole number that is computed is refused: shapes would depend on it.

    Args:
        granule: bytes that every storage's size is rounded up to.

    Attributes:
        yes: the answer where a truth value is read.
        phase: what is going on, by a name of the caller's.
        peaks: the most that was live in each phase since :meth:`reset_peak`.
    """

    def __init__(self, granule: int = 1) -> None:
        super().__init__()
        self._granule = granule
        self.yes = False
        self.phase = ""
        self.peaks: dict[str, int] = {}

    def reset_peak(self) -> None:
        super().reset_peak()
        self.peaks = {}

    def storage_of(self, value: object) -> torch.UntypedStorage | None:
        if not isinstance(value, FakeTensor) or value.layout is not torch.strided:
            return None
        return value.untyped_storage()

    def bytes_of(self, storage: torch.UntypedStorage) -> int:
        return -(-storage.nbytes() // self._granule) * self._granule

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in _DRAWS and not _shape_drawn(func, args):
            # A tensor whose value the fake mode knows.
            return torch.tensor(0)
        if func is _EQUAL:
            return True
        if func is _READ:
            return self._read(args[0])
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _read(self, tensor: Tensor) -> bool | float | int:
        try:
            known: bool | float | int = _READ(tensor)
        except DataDependentOutputException:
            if tensor.dtype is torch.bool:
                return self.yes
            if tensor.is_floating_point():
                return 1.0
            raise
        return known

    def _write_down(self, name: object, grown: dict[int, tuple[torch.UntypedStorage, int]]) -> None:
        super()._write_down(name, grown)
        self.peaks[self.phase] = max(self.peaks.get(self.phase, 0), self.live_bytes)


def _shape_drawn(func: Any, args: Sequence[Any]) -> Sequence[int]:
    """Of ``randint(high, size)`` or ``randint(low, high, size)``."""
    shape: Sequence[int] = args[1] if func is _DRAWS[0] else args[2]
    return shape
