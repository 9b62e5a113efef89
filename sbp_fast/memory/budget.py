"""A memory budget as a number: "8GiB" to bytes, and bytes to text."""

from __future__ import annotations

import re

UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
PATTERN = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", re.IGNORECASE | re.ASCII)


def parse_bytes(budget: int | str) -> int:
    """Whole bytes, at least 1, of a number of bytes or of text such as "8GiB", "512 MiB" or "2GB".

    KiB, MiB, GiB, TiB are powers of 1024, KB, MB, GB, TB powers of 1000; case does not matter; a
    fraction of a byte is dropped. Raises TypeError for anything but int and str, ValueError for
    text that is no size.
    """
    expected = 'expected a number of bytes >= 1 or text such as "8GiB", "512 MiB" or "2GB"'
    if isinstance(budget, bool) or not isinstance(budget, (int, str)):
        raise TypeError(f"memory budget {budget!r} is a {type(budget).__name__}; {expected}")
    if isinstance(budget, int):
        size = budget
    else:
        match = PATTERN.fullmatch(budget)
        if match is None or match[2].lower() not in UNITS:
            raise ValueError(f"memory budget {budget!r} is no size; {expected}")
        number, unit = match[1], UNITS[match[2].lower()]
        # Whole numbers stay exact above 2^53.
        size = int(float(number) * unit) if "." in number else int(number) * unit
    if size < 1:
        raise ValueError(f"memory budget {budget!r} is {size} bytes; {expected}")
    return size


def format_bytes(size: int) -> str:
    """Bytes in the largest binary unit that makes at least one: "1.5 GiB", "640.0 MiB", "12 B"."""
    for unit, power in (("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if abs(size) >= 2**power:
            return f"{size / 2**power:,.1f} {unit}"
    return f"{size} B"
