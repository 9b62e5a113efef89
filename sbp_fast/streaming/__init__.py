"""Micro-batches on their way from the host to the device."""

from .pinned_ring import PinnedRing
from .stream import stream_to

__all__ = ["PinnedRing", "stream_to"]
