"""Device memory: budgets, what is in use, and the peak."""

from .budget import format_bytes, parse_bytes
from .device_budget import DeviceMemory, memory_budget
from .freed_pages import keep_freed_pages
from .live_bytes import LiveBytes
from .timeline import MemoryTimeline

__all__ = [
    "DeviceMemory",
    "LiveBytes",
    "MemoryTimeline",
    "format_bytes",
    "keep_freed_pages",
    "memory_budget",
    "parse_bytes",
]
