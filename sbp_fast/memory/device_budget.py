"""One memory budget for either device: counted tensors on the CPU, the allocator on CUDA."""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import Protocol

import torch
from torch import Tensor

from .budget import format_bytes, parse_bytes
from .live_bytes import LiveBytes


class DeviceMemory(Protocol):
    """What both devices offer. The budget holds inside the `with` block, which may be repeated."""

    @property
    def live_bytes(self) -> int: ...

    @property
    def peak_bytes(self) -> int: ...

    def reset_peak(self) -> None: ...

    def track(self, tensors: Iterable[Tensor]) -> None: ...

    def __enter__(self) -> DeviceMemory: ...

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...


def free_bytes(device: torch.device) -> int:
    """What this process may still allocate on a device of its own: 0 on the CPU, which is the host."""
    if device.type != "cuda":
        return 0
    free, _ = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free + cached


class CudaMemory:
    """Budget and peak of this process's CUDA caching allocator.

    The limit is on what the allocator reserves from the device, the figures are of the tensors in
    it: with fragmentation, memory runs out somewhat before the peak reaches the budget.
    """

    def __init__(self, device: torch.device, limit_bytes: int | None) -> None:
        """Raises ValueError if the device has less than `limit_bytes`; None measures only."""
        self.device = device
        self.fraction: float | None = None
        if limit_bytes is not None:
            total = torch.cuda.get_device_properties(device).total_memory
            if limit_bytes > total:
                raise ValueError(
                    f"memory budget {format_bytes(limit_bytes)}, expected at most the "
                    f"{format_bytes(total)} that {device} has; give a smaller budget, or none"
                )
            self.fraction = limit_bytes / total
        self._fractions_before: list[float] = []
        self.reset_peak()

    @property
    def live_bytes(self) -> int:
        return torch.cuda.memory_allocated(self.device)

    @property
    def peak_bytes(self) -> int:
        return torch.cuda.max_memory_allocated(self.device)

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)

    def track(self, tensors: Iterable[Tensor]) -> None:
        """Nothing to do: what lies on the device is counted by the allocator."""

    def __enter__(self) -> CudaMemory:
        self._fractions_before.append(torch.cuda.get_per_process_memory_fraction(self.device))
        if self.fraction is not None:
            # Cached blocks count against the limit.
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(self.fraction, self.device)
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        torch.cuda.set_per_process_memory_fraction(self._fractions_before.pop(), self.device)


def memory_budget(device: torch.device | str, budget: int | str | None) -> DeviceMemory:
    """A context manager inside which `device` has only `budget` (bytes or "8GiB").

    None sets no limit and only measures. Going over raises torch.OutOfMemoryError. `live_bytes` and
    `peak_bytes` measure; `track` names tensors made earlier that count as the device's
    (parameters). Raises ValueError for a budget that is no size or more than the device has, and
    for a device other than CPU or CUDA.
    """
    limit_bytes = None if budget is None else parse_bytes(budget)
    device = torch.device(device)
    if device.type == "cpu":
        return LiveBytes(limit_bytes)
    if device.type == "cuda":
        return CudaMemory(device, limit_bytes)
    raise ValueError(f"no memory budget for device {device}; expected cpu or cuda")
