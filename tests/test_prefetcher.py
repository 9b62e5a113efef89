"""The native ring through its bindings, with a host stand-in for the device's streams."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sbp_fast.batches import split
from sbp_fast.data import Rows
from sbp_fast.ops import native
from sbp_fast.streaming import Prefetcher, make_ring, stream_to
from sbp_fast.streaming.rows_in_memory import RowsInMemory, rows_in_memory

if not native.load_prefetch().usable:
    pytest.skip(native.load_prefetch().reason, allow_module_level=True)

MODULE = native.prefetch_module()
CPU = torch.device("cpu")
SLOW = pytest.mark.parametrize("slow", ["main", "side"])


def piece(leaf: Any, gathered: Tensor, device: Tensor | None = None) -> Any:
    rows = leaf if isinstance(leaf, RowsInMemory) else rows_in_memory(leaf)
    return MODULE.Piece(
        **rows.source,
        gathered=gathered.data_ptr(),
        device=0 if device is None else device.data_ptr(),
    )


def gathered_by_the_ring(leaf: Any) -> Tensor:
    rows = rows_in_memory(leaf)
    result = torch.empty_strided(rows.shape, rows.strides, dtype=rows.dtype)
    ring = MODULE.Ring(None)
    ring.receive(ring.submit([piece(rows, result)], 0), 0)
    return result


class TestRowsInMemory:
    @pytest.mark.parametrize(
        "make",
        [
            lambda x: x,
            lambda x: x[3:11],
            lambda x: x[::2],
            lambda x: x[:, 1:3],
            lambda x: x[..., 1::2],
            lambda x: x[:, :, 0],
            lambda x: x.to(memory_format=torch.channels_last),
            lambda x: x.to(memory_format=torch.channels_last)[2:7],
            lambda x: x.permute(3, 0, 2, 1),
            lambda x: x[:, :1].expand(-1, 3, -1, -1),
            lambda x: x[:1].expand(5, -1, -1, -1),
            lambda x: x[:, 0, 0, 0],
            lambda x: x[:, :0],
            lambda x: x[0, 0, 0, 0],
            lambda x: x.bfloat16(),
            lambda x: x > 0,
            lambda x: x.to(torch.complex64).conj(),
            lambda x: x.numpy()[::-1, ::-1],
            lambda x: x.numpy()[:, :, ::-2],
            lambda x: Rows(x[:, 1:3], [5, 0, 5, 12]),
            lambda x: Rows(x.to(memory_format=torch.channels_last), [1]),
            lambda x: Rows(x.numpy()[::-1], [0, 12])[1:],
        ],
    )
    def test_any_layout(self, make: Callable[[Tensor], Any]) -> None:
        leaf = make(torch.randn(13, 4, 5, 6))
        if isinstance(leaf, Rows):
            expected = leaf.gather()
        else:
            expected = torch.as_tensor(leaf.copy() if isinstance(leaf, np.ndarray) else leaf)
        result = gathered_by_the_ring(leaf)
        assert result.dtype == expected.dtype
        assert torch.equal(result, expected)

    def test_rows_stay_as_dense_as_they_are(self) -> None:
        x = torch.randn(4, 3, 8, 8).to(memory_format=torch.channels_last)
        assert rows_in_memory(x).strides == x.stride()
        assert rows_in_memory(Rows(x, [2, 1])).strides == x.stride()
        assert not rows_in_memory(x).source["inner"]
        assert rows_in_memory(x[:, :, ::2]).strides == (96, 32, 8, 1)

    def test_what_may_be_read_in_place(self) -> None:
        x = torch.randn(6, 4)
        assert rows_in_memory(x[1:3]).one_run
        for leaf in (x[::2], x[:, :2], x.t(), Rows(x, [0, 1])):
            assert not rows_in_memory(leaf).one_run


class TestOrders:
    """One stream runs only when it is waited for: who forgets to wait computes with other rows."""

    @SLOW
    def test_micro_batches_of_all_sizes_arrive_as_they_are(self, slow: str) -> None:
        engine = MODULE.HostEngine(slow)
        ring = MODULE.Ring(engine)
        source = torch.arange(40.0).reshape(20, 2)
        host, device = torch.zeros(2, 8), torch.zeros(2, 8)
        batches = [
            Rows(source, [(7 * number + i) % 20 for i in range(1 + number % 4)])
            for number in range(11)
        ]
        results = [torch.zeros(batch.shape) for batch in batches]

        def submit(number: int) -> int:
            slot = number % 2
            return int(ring.submit([piece(batches[number], host[slot], device[slot])], 0))

        following = submit(0)
        for number, result in enumerate(results):
            ticket = following
            if number + 1 < len(batches):
                following = submit(number + 1)
            ring.receive(ticket, 0)
            engine.read(result.data_ptr(), device[number % 2].data_ptr(), result.nbytes)
        ring.join(0)
        engine.synchronize()
        for batch, result in zip(batches, results, strict=True):
            assert torch.equal(result, batch.gather())

    def test_a_slot_is_not_taken_before_it_is_received(self) -> None:
        ring = MODULE.Ring(None)
        x, slots = torch.ones(2), torch.empty(3, 2)
        tickets = [ring.submit([piece(x, slot)], 0) for slot in slots[:2]]
        with pytest.raises(
            RuntimeError, match="micro-batch 0 was not received, and its slot is wa"
        ):
            ring.submit([piece(x, slots[2])], 0)
        ring.receive(tickets[0], 0)
        with pytest.raises(RuntimeError, match="micro-batch 0 is not on its way"):
            ring.receive(tickets[0], 0)
        ring.receive(ring.submit([piece(x, slots[2])], 0), 0)
        assert torch.equal(slots, torch.ones(3, 2))

    def test_an_unknown_stream(self) -> None:
        with pytest.raises(ValueError, match="slow is 'both'; it must be 'main' or 'side'"):
            MODULE.HostEngine("both")


class TestErrors:
    @pytest.mark.parametrize("engine", [None, MODULE.HostEngine("side")])
    def test_come_to_the_caller_and_the_ring_goes_on(self, engine: Any) -> None:
        ring = MODULE.Ring(engine)
        rows = Rows(torch.arange(4), [0, 1, 2])
        result, device = torch.zeros(3, dtype=torch.long), torch.zeros(3, dtype=torch.long)
        for wrong in (4, -1):
            rows.index[1] = wrong
            ticket = ring.submit([piece(rows, result, device)], 0)
            with pytest.raises(
                IndexError, match=rf"index\[1\] of a micro-batch is {wrong}; the sou"
            ):
                ring.receive(ticket, 0)
        rows.index[1] = 3
        ring.receive(ring.submit([piece(rows, result, device)], 0), 0)
        assert result.tolist() == [0, 3, 2]

    def test_of_what_nobody_receives_are_forgotten(self) -> None:
        ring = MODULE.Ring(None)
        rows, result = Rows(torch.arange(4), [0]), torch.zeros(1, dtype=torch.long)
        rows.index[0] = 9
        ring.submit([piece(rows, result)], 0)
        ring.join(0)
        rows.index[0] = 2
        ring.receive(ring.submit([piece(rows, result)], 0), 0)
        assert result.tolist() == [2]


class TestLives:
    @pytest.fixture(autouse=True)
    def _others_have_ended(self) -> None:
        gc.collect()

    def test_ten_thousand_micro_batches_by_one_thread(self) -> None:
        before = threads(), descriptors()
        ring = Prefetcher(CPU, MODULE)
        source = torch.arange(64)
        pieces = split(Rows(source, source.repeat(313)[:20000]), None, 2, with_targets=False)
        total = 0
        for number, arrival in enumerate(stream_to(CPU, pieces, ring)):
            total += int(arrival.micro_batch.inputs[1])
            if number == 100:
                assert threads() == before[0] + 1
                assert descriptors() == before[1]
        assert total == int(source.repeat(313)[:20000][1::2].sum())
        assert (threads(), descriptors()) == (before[0] + 1, before[1])
        del ring
        gc.collect()
        assert_threads(before[0])

    def test_end_while_a_job_is_in_flight(self) -> None:
        source = torch.ones(4_000_000)
        before = threads()
        for engine in (None, MODULE.HostEngine("side")) * 5:
            ring = MODULE.Ring(engine)
            results = [torch.empty(4_000_000) for _ in range(4)]
            for result, device in zip(results[:2], results[2:], strict=True):
                ring.submit([piece(source, result, device)], 0)
            del ring
            assert_threads(before)

    def test_the_thread_needs_no_interpreter(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """It fills a slot while another thread keeps the GIL."""
        ring = MODULE.Ring(None)
        source, result = torch.ones(1000), torch.zeros(1000)
        last = ctypes.c_float.from_address(result[-1:].data_ptr())
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1000.0)
        try:
            ticket = ring.submit([piece(source, result)], 0)
            deadline = time.monotonic() + 60
            while last.value == 0.0 and time.monotonic() < deadline:
                pass
        finally:
            sys.setswitchinterval(interval)
        assert last.value == 1.0
        ring.receive(ticket, 0)

    def test_a_forked_child_makes_its_own(self) -> None:
        ring = Prefetcher(CPU, MODULE)
        rows = Rows(torch.arange(6), [5, 3, 1])
        pieces = split(rows, None, 2, with_targets=False)

        def computed() -> list[list[int]]:
            return [a.micro_batch.inputs.tolist() for a in stream_to(CPU, pieces, ring)]

        assert computed() == [[5, 3], [1]]
        child = os.fork()
        if child == 0:
            os._exit(0 if computed() == [[5, 3], [1]] else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert computed() == [[5, 3], [1]]

    def test_a_ring_says_that_its_thread_is_elsewhere(self) -> None:
        ring = MODULE.Ring(None)
        x = torch.ones(2)
        child = os.fork()
        if child == 0:
            try:
                ring.submit([piece(x, x)], 0)
            except RuntimeError as error:
                os._exit(0 if "forked from; make a ring of its own" in str(error) else 1)
            os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


class TestStream:
    def test_the_next_one_is_read_while_one_computes(self) -> None:
        """What is written to the source afterwards does not reach it."""
        source = torch.arange(6)
        ring = Prefetcher(CPU, MODULE)
        pieces = split(Rows(source, [0, 1, 2, 3, 4, 5]), None, 2, with_targets=False)
        stream = stream_to(CPU, pieces, ring)
        assert next(stream).micro_batch.inputs.tolist() == [0, 1]
        ring.finish_reading()
        source.zero_()
        assert next(stream).micro_batch.inputs.tolist() == [2, 3]
        ring.finish_reading()
        last = next(stream)
        assert last.micro_batch.inputs.tolist() == [0, 0]
        assert last.is_last

    def test_a_stream_that_is_left_leaves_nothing_in_flight(self) -> None:
        ring = Prefetcher(CPU, MODULE)
        pieces = split(Rows(torch.arange(6), [0, 1, 2, 3, 4, 5]), None, 1, with_targets=False)
        for _ in range(3):
            stream = stream_to(CPU, pieces, ring)
            next(stream)
            next(stream)
            stream.close()  # type: ignore[attr-defined]
        arrived = [arrival.micro_batch.inputs.item() for arrival in stream_to(CPU, pieces, ring)]
        assert arrived == [0, 1, 2, 3, 4, 5]

    def test_tensors_in_memory_are_not_copied(self, tmp_path: Path) -> None:
        np.save(tmp_path / "x.npy", np.arange(6.0))
        mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
        labels = torch.arange(6)
        pieces = split(mapped, labels, 4, with_targets=True)
        arrivals = [a.micro_batch for a in stream_to(CPU, pieces, Prefetcher(CPU, MODULE))]
        assert arrivals[1].targets.data_ptr() == labels[4:].data_ptr()
        assert arrivals[1].inputs.tolist() == [4, 5]

    def test_what_is_kept_has_memory_of_its_own(self) -> None:
        pieces = split(Rows(torch.arange(6), [5, 4, 3, 2, 1, 0]), None, 1, with_targets=False)
        ring = Prefetcher(CPU, MODULE)
        kept = [a.micro_batch.inputs for a in stream_to(CPU, pieces, ring, keep=True)]
        assert [tensor.item() for tensor in kept] == [5, 4, 3, 2, 1, 0]
        assert len({tensor.data_ptr() for tensor in kept}) == 6

    def test_slots_shrink_with_the_micro_batches(self) -> None:
        ring = Prefetcher(CPU, MODULE)
        rows = Rows(torch.arange(64.0), torch.arange(64))
        held = []
        for size in (32, 4, 4, 16):
            deque(stream_to(CPU, split(rows, None, size, with_targets=False), ring), maxlen=0)
            held.append([slot._arrivals[0].nbytes() for slot in ring._slots])
        # What is too large goes when a large batch has needed less.
        assert held == [[128, 128], [0, 0], [16, 16], [64, 64]]


def test_without_the_module_micro_batches_are_prepared_when_they_are_needed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    missing = native.Availability(False, "not built")
    monkeypatch.setattr("sbp_fast.streaming.prefetcher.load_prefetch", lambda: missing)
    assert make_ring(CPU) is None
    assert make_ring(torch.device("meta")) is None


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


def assert_threads(expected: int) -> None:
    """The kernel forgets a thread shortly after it was joined."""
    deadline = time.monotonic() + 60
    while threads() > expected and time.monotonic() < deadline:
        pass
    assert threads() <= expected


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))
