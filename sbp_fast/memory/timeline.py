"""Device memory over time: after every operation, as a table, a picture, and on CUDA torch's snapshot."""

from __future__ import annotations

import csv
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .device_budget import DeviceMemory, memory_budget

# Entries of the allocator's history that torch keeps: some minutes of a large model.
_SNAPSHOT_ENTRIES = 100_000


class MemoryTimeline:
    """A context manager that notes how much device memory is in use, after each operation.

    On the CPU what is made inside counts, and what :meth:`track` names; see :class:`LiveBytes`. On CUDA
    it is the allocator's figure, and operations of other streams are seen when the next one is launched.
    It takes some 10 microseconds an operation, and may be entered several times.

    Args:
        device: ``cpu`` or ``cuda``.

    Attributes:
        points: ``(seconds, bytes)``, seconds from the first entry on; equal bytes in a row only once.

    Raises:
        ValueError: another device.
    """

    def __init__(self, device: torch.device | str) -> None:
        self._device = torch.device(device)
        self._memory: DeviceMemory = memory_budget(self._device, None)
        self._mode = _AfterEveryOperation(self)
        self._beginning: float | None = None
        self.points: list[tuple[float, int]] = []

    @property
    def peak_bytes(self) -> int:
        """The highest point; 0 where nothing was noted."""
        return max((size for _, size in self.points), default=0)

    def track(self, tensors: Iterable[Tensor]) -> None:
        """On the CPU, counts tensors made earlier (parameters, say) as device memory."""
        self._memory.track(tensors)

    def note(self) -> None:
        """A point, if memory is not as at the last one."""
        size = self._memory.live_bytes
        if self._beginning is not None and (not self.points or self.points[-1][1] != size):
            self.points.append((time.perf_counter() - self._beginning, size))

    def __enter__(self) -> MemoryTimeline:
        if self._beginning is None:
            self._beginning = time.perf_counter()
        if self._device.type == "cuda":
            torch.cuda.memory._record_memory_history(max_entries=_SNAPSHOT_ENTRIES)
        self._memory.__enter__()
        # Above the counter, so that it sees what that has counted.
        self._mode.__enter__()  # type: ignore[no-untyped-call]
        self.note()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.note()
        self._mode.__exit__(kind, error, traceback)  # type: ignore[no-untyped-call]
        self._memory.__exit__(kind, error, traceback)

    def save_csv(self, path: str | Path) -> None:
        """Writes a row for each point: ``seconds``, ``bytes``."""
        with Path(path).open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("seconds", "bytes"))
            writer.writerows((f"{seconds:.6f}", size) for seconds, size in self.points)

    def save_plot(self, path: str | Path, budget: int | None = None) -> None:
        """Draws bytes over time, with a line for a budget.

        Args:
            path: its suffix names the format (``.png``, ``.svg``, ``.pdf``).

        Raises:
            ValueError: nothing was noted.
            ImportError: matplotlib is not installed; the message says how to get it.
        """
        if not self.points:
            raise ValueError(
                "the timeline has no points; compute something inside of its with block"
            )
        from ..report.timeline_plot import save_timeline_figure

        save_timeline_figure(Path(path), self.points, budget)

    def save_snapshot(self, path: str | Path) -> None:
        """On CUDA, writes what https://docs.pytorch.org/memory_viz shows: all blocks, and their origin.

        Raises:
            RuntimeError: the device is no CUDA device.
        """
        if self._device.type != "cuda":
            raise RuntimeError(
                f"snapshots are of the CUDA allocator, and the timeline is of {self._device}; use "
                "save_csv or save_plot"
            )
        torch.cuda.memory._dump_snapshot(str(path))


class _AfterEveryOperation(TorchDispatchMode):
    def __init__(self, timeline: MemoryTimeline) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._timeline = timeline

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        outputs = func(*args, **(kwargs or {}))
        self._timeline.note()
        return outputs
