"""The stream of micro-batches on the host; tests/gpu has the side stream."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from sbp_fast.batches import MicroBatch, split
from sbp_fast.streaming import stream_to

CPU = torch.device("cpu")


def pieces(count: int) -> list[MicroBatch]:
    return split(torch.arange(count).float(), torch.arange(count), 2, with_targets=True)


def test_order_and_the_last_one() -> None:
    arrivals = list(stream_to(CPU, pieces(7), ring=None))
    assert [arrival.is_last for arrival in arrivals] == [False, False, False, True]
    inputs = torch.cat([arrival.micro_batch.inputs for arrival in arrivals])
    assert torch.equal(inputs, torch.arange(7).float())


def test_a_single_piece_is_the_last() -> None:
    assert [arrival.is_last for arrival in stream_to(CPU, pieces(2), ring=None)] == [True]


def test_nothing_gives_nothing() -> None:
    assert list(stream_to(CPU, [], ring=None)) == []


def test_nothing_is_read_ahead_on_the_host() -> None:
    """A generator may fill the same buffer again and again."""
    taken: list[int] = []

    def slowly() -> Iterator[MicroBatch]:
        for index, piece in enumerate(pieces(8)):
            taken.append(index)
            yield piece

    stream = stream_to(CPU, slowly(), ring=None)
    assert not next(stream).is_last
    assert taken == [0]
    next(stream)
    assert taken == [0, 1]


def test_host_tensors_are_not_copied_and_arrays_become_tensors() -> None:
    rows = torch.randn(4, 3)
    array = np.arange(4.0)
    (arrival,) = stream_to(
        CPU, split({"x": rows, "y": array, "flag": "kept"}, None, 9, with_targets=False), ring=None
    )
    inputs = arrival.micro_batch.inputs
    assert inputs["x"].data_ptr() == rows.data_ptr()
    assert torch.equal(inputs["y"], torch.from_numpy(array))
    assert inputs["flag"] == "kept"


def test_other_devices_get_a_copy() -> None:
    (arrival,) = stream_to(torch.device("meta"), pieces(2), ring=None)
    assert arrival.micro_batch.inputs.device.type == "meta"
