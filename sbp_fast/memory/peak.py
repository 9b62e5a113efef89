"""The peak of device memory over a step."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from .live_bytes import LiveBytes


class PeakMeter:
    """Measures from its creation to :meth:`peak_bytes`.

    Attributes:
        counter: what counts on the CPU; None where nothing does.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.counter: LiveBytes | None = None
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            modes = _get_current_dispatch_mode_stack()
            self.counter = next((m for m in reversed(modes) if isinstance(m, LiveBytes)), None)
        if self.counter is not None:
            self._peak_before = self.counter.peak_bytes
            self.counter.reset_peak()

    def peak_bytes(self) -> int | None:
        """Bytes; None on a device where nothing counts them."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        if self.counter is None:
            return None
        peak = self.counter.peak_bytes
        # Whoever counts over a longer time keeps the larger peak.
        self.counter.peak_bytes = max(peak, self._peak_before)
        return peak

    def reserved_bytes(self) -> int | None:
        """Bytes that the CUDA allocator had from the device at most; None elsewhere."""
        if self._device.type != "cuda":
            return None
        return torch.cuda.max_memory_reserved(self._device)
