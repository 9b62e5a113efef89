"""Micro-batches on their way from the host to the device."""

from .prefetcher import Prefetcher, make_ring
from .stream import Arrival, Ring, moved, stream_to

__all__ = ["Arrival", "Prefetcher", "Ring", "make_ring", "moved", "stream_to"]
