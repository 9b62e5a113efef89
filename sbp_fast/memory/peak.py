"""The peak of device memory over a step."""

from __future__ import annotations

import torch


class PeakMeter:
    """Measures from its creation on."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def peak_bytes(self) -> int | None:
        """Bytes; None on a device where nothing counts them."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return None
