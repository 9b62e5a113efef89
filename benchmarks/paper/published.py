"""The paper's own figures: Ravi Kumar and Sivakumar 2025, tables 2 to 5.

None is the paper's F, for failure: the batch did not fit. The tables give a percentage and a "training
time" in milliseconds, without saying of what; its device is an RTX 3090 of 24 GB. Where a table
contradicts itself (a batch of 8 fails where one of 16 does not), it is left as it is printed.
"""

from __future__ import annotations

from typing import NamedTuple


class Published(NamedTuple):
    """Accuracy (IoU for U-Net) in percent and time in milliseconds, without SBP and with it."""

    without_percent: float | None
    sbp_percent: float
    without_ms: float | None
    sbp_ms: float


TABLES: dict[str, tuple[int, dict[int, Published]]] = {
    "ResNet-50": (
        2,
        {
            1024: Published(None, 79, None, 240),
            512: Published(None, 86, None, 230),
            256: Published(None, 90, None, 225),
            128: Published(None, 90, None, 225),
            64: Published(None, 90, None, 225),
            32: Published(None, 90, None, 230),
            16: Published(88, 90, 220, 230),
            8: Published(None, 90, None, 230),
        },
    ),
    "ResNet-101": (
        3,
        {
            1024: Published(None, 78, None, 340),
            512: Published(None, 85, None, 330),
            256: Published(None, 89, None, 325),
            128: Published(None, 90, None, 325),
            64: Published(None, 89, None, 325),
            32: Published(None, 89, None, 330),
            16: Published(85, 90, 220, 330),
            8: Published(None, 89, None, 330),
        },
    ),
    "AmoebaNet-D": (
        4,
        {
            1024: Published(None, 68, None, 112),
            512: Published(None, 75, None, 102),
            256: Published(None, 79, None, 97),
            128: Published(None, 70, None, 96),
            64: Published(None, 79, None, 95),
            32: Published(None, 79, None, 103),
            16: Published(75, 70, 220, 106),
            8: Published(None, 79, None, 109),
        },
    ),
    "U-Net": (
        5,
        {
            1024: Published(None, 88, None, 212),
            512: Published(None, 95, None, 202),
            256: Published(None, 99, None, 197),
            128: Published(None, 90, None, 196),
            64: Published(None, 99, None, 195),
            32: Published(None, 99, None, 203),
            16: Published(95, 90, 190, 206),
            8: Published(None, 99, None, 209),
        },
    ),
}
