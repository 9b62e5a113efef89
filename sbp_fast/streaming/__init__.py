"""Micro-batches on their way from the host to the device."""

from .pinned_ring import PinnedRing
from .stream import Arrival, moved, stream_to

__all__ = ["Arrival", "PinnedRing", "moved", "stream_to"]
