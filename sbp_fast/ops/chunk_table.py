"""The chunk table of the Triton backend: many tensors in one launch.

Tensors are cut into chunks of a fixed number of elements and the chunks of a call are laid out as
rows of one int64 table, which travels to the device in one copy. Pure functions of addresses and
sizes, in numpy: the cost per tensor stays low, and tensors of any size can be planned without
allocating them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Int64s = NDArray[np.int64]

# Elements per program. The cut depends on sizes alone, never on the device, so partial sums are the
# same on every device of one kind. Eight blocks of 1,024: enough to repay a program's start, few
# enough that a bucket the size of an L2 cache still fills the device.
CHUNK_ELEMENTS = 8192

# What a 128-bit access demands of an address.
ALIGNMENT = 16


@dataclass(frozen=True)
class Group:
    """Consecutive rows of the table that one launch serves: one kind of tensor, one alignment."""

    kind: int
    aligned: bool
    first: int
    chunks: int


def plan(
    written: Int64s,
    read: Int64s,
    numels: Int64s,
    kinds: Int64s,
    itemsizes: Int64s,
    value: float,
) -> tuple[Int64s, list[Group]]:
    """Cuts pairs of tensors into chunks, sorted into groups.

    Args:
        written, read: int64[n]: addresses of what is written and of what is read.
        numels: int64[n]: elements of each pair; 0 gives no chunk.
        kinds: int64[n]: a number per pair; pairs of different kinds share no group.
        itemsizes: int64[kinds, 2]: bytes per element, written and read, by kind.
        value: a float64 for the kernel; its bits stand in every row. (A kernel's float argument is
            float32.)

    Returns:
        rows: int64[chunks, 4]: written address, read address, elements, bits of ``value``. A row
            is 32 bytes long, so that any group's first row is aligned.
        groups: those that have chunks, in a fixed order; within a group, the order of the list.
    """
    aligned = (written | read) % ALIGNMENT == 0
    keys = kinds * 2 + aligned
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    numels = numels[order]
    bytes_each = itemsizes[kinds[order]]

    chunks_each = -(-numels // CHUNK_ELEMENTS)
    ends = np.cumsum(chunks_each)
    pair = np.repeat(np.arange(len(numels)), chunks_each)
    begin = (np.arange(len(pair)) - (ends - chunks_each)[pair]) * CHUNK_ELEMENTS
    rows = np.empty((len(pair), 4), np.int64)
    rows[:, 0] = written[order][pair] + begin * bytes_each[pair, 0]
    rows[:, 1] = read[order][pair] + begin * bytes_each[pair, 1]
    rows[:, 2] = np.minimum(numels[pair] - begin, CHUNK_ELEMENTS)
    rows[:, 3] = np.float64(value).view(np.int64)

    present = np.unique(keys[pair], return_index=True, return_counts=True)
    groups = [
        Group(key // 2, bool(key % 2), first, chunks)
        for key, first, chunks in zip(*(column.tolist() for column in present), strict=True)
    ]
    return rows, groups
