"""What the C library does with memory that is freed: given back to the system, every page of it must be
mapped and cleared again when the next micro-batch asks for as much."""

from __future__ import annotations

import ctypes

# malloc.h of glibc.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_NEVER = -1
# The largest that can be said; before glibc 2.35 or so, no more than half of an arena's heap is taken.
_LARGEST = 2**31 - 1, 32 << 20


def keep_freed_pages() -> bool:
    """From now on, freed host memory stays with the process, ready for the next activations.

    Training on the CPU frees and asks for the same activations over and over. By default glibc returns
    large ones to the system at once, and a step spends a good part of its time on page faults. The price:
    the resident size stays at its peak, and it is the whole process that keeps its memory. CUDA memory is
    not concerned. Cannot be undone; calling it again changes nothing.

    Returns:
        False where nothing could be done: the C library is not glibc, or another allocator is in use.
    """
    try:
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018 (musl has mallopt as well, and ignores it)
        mallopt = library.mallopt
    except (OSError, AttributeError, TypeError):
        return False
    mallopt.argtypes, mallopt.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    largest = any(mallopt(_M_MMAP_THRESHOLD, size) for size in _LARGEST)
    return largest and bool(mallopt(_M_TRIM_THRESHOLD, _NEVER))
