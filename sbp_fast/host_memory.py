"""Memory of the host where the CPU plays host and device at once."""

from __future__ import annotations

from contextlib import AbstractContextManager

# As torch's own code that must not be seen by a mode.
from torch.utils._python_dispatch import _disable_current_modes


def host_memory() -> AbstractContextManager[object]:
    """What is allocated inside is the large batch that waits, and no memory of the device: a budget for
    the CPU (:class:`sbp_fast.memory.LiveBytes`) counts it as little as the caller's tensors."""
    return _disable_current_modes()
