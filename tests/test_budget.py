"""Sizes as text, and one budget for either device."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sbp_fast.memory import LiveBytes, format_bytes, memory_budget, parse_bytes
from sbp_fast.memory.device_budget import CudaMemory


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (1, 1),
        (2**70, 2**70),
        ("123", 123),
        ("17B", 17),
        ("8GiB", 8 * 2**30),
        ("512 MiB", 512 * 2**20),
        ("2GB", 2 * 10**9),
        (" 1.5 gib ", 3 * 2**29),
        ("3kB", 3000),
        ("1TiB", 2**40),
        ("0.5 KiB", 512),
        ("9007199254740993", 2**53 + 1),
    ],
)
def test_parse_bytes(text: int | str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "text", ["", "GiB", "8 G", "8 gigabytes", "-1GiB", "1e9", "1,5GiB", "0", "0.1B", 0, -3, "٣MB"]
)
def test_parse_bytes_names_what_it_refuses(text: int | str) -> None:
    with pytest.raises(
        ValueError, match="expected a number of bytes >= 1 or text such as"
    ) as caught:
        parse_bytes(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize("budget", [1.5, None, True, b"8GiB"])
def test_parse_bytes_takes_only_int_and_str(budget: object) -> None:
    with pytest.raises(TypeError, match=type(budget).__name__):
        parse_bytes(budget)  # type: ignore[arg-type]


@given(st.integers(1, 10**6), st.sampled_from([("KiB", 2**10), ("MB", 10**6), ("TiB", 2**40)]))
def test_parse_bytes_is_exact(number: int, unit: tuple[str, int]) -> None:
    name, factor = unit
    assert parse_bytes(f"{number}{name}") == parse_bytes(f"{number} {name.lower()}")
    assert parse_bytes(f"{number}{name}") == number * factor


@given(st.integers(1, 2**60))
def test_format_bytes_reads_back_to_within_its_digit(size: int) -> None:
    back = parse_bytes(format_bytes(size).replace(",", ""))
    # One digit after the point of a number that is at least 1.
    assert abs(back - size) <= 0.051 * size


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.5 KiB"),
        (640 * 2**20, "640.0 MiB"),
        (2**41, "2.0 TiB"),
    ],
)
def test_format_bytes(size: int, text: str) -> None:
    assert format_bytes(size) == text


def test_budget_on_the_cpu_counts_and_limits() -> None:
    with memory_budget("cpu", "1KiB") as memory:
        assert isinstance(memory, LiveBytes)
        kept = torch.zeros(200)
        with pytest.raises(torch.OutOfMemoryError):
            torch.zeros(100)
        assert memory.live_bytes == memory.peak_bytes == kept.nbytes
    with memory_budget("cpu", None) as memory:
        del kept
        torch.zeros(10**6)
        assert memory.peak_bytes == 4 * 10**6


def test_budget_on_another_device_is_refused() -> None:
    with pytest.raises(ValueError, match="device meta; expected cpu or cuda"):
        memory_budget("meta", "1GiB")


class PretendedAllocator:
    """What `CudaMemory` calls of torch.cuda, for a device of 1000 bytes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fraction = 0.75
        self.emptied = 0
        for name, function in {
            "get_device_properties": lambda device: SimpleNamespace(total_memory=1000),
            "get_per_process_memory_fraction": lambda device: self.fraction,
            "set_per_process_memory_fraction": self.set_fraction,
            "empty_cache": self.empty,
            "reset_peak_memory_stats": lambda device: None,
            "memory_allocated": lambda device: 100,
            "max_memory_allocated": lambda device: 300,
        }.items():
            monkeypatch.setattr(torch.cuda, name, function)

    def set_fraction(self, fraction: float, device: torch.device) -> None:
        self.fraction = fraction

    def empty(self) -> None:
        self.emptied += 1


def test_budget_on_cuda_sets_the_allocator_s_limit_and_puts_it_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    allocator = PretendedAllocator(monkeypatch)
    memory = memory_budget("cuda:0", 400)
    assert isinstance(memory, CudaMemory)
    assert (memory.live_bytes, memory.peak_bytes) == (100, 300)
    assert allocator.fraction == 0.75, "nothing is limited before the block"
    with memory:
        assert allocator.fraction == 0.4
        assert allocator.emptied == 1
        with memory_budget("cuda:0", 200):
            assert allocator.fraction == 0.2
        with memory_budget("cuda:0", None):
            assert allocator.fraction == 0.4, "no limit of its own"
        assert allocator.fraction == 0.4
    assert allocator.fraction == 0.75
    with pytest.raises(ZeroDivisionError), memory:
        raise ZeroDivisionError
    assert allocator.fraction == 0.75


def test_budget_on_cuda_above_what_the_device_has(monkeypatch: pytest.MonkeyPatch) -> None:
    PretendedAllocator(monkeypatch)
    with pytest.raises(ValueError, match="expected at most the 1000 B that cuda:0 has"):
        memory_budget("cuda:0", 1001)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_budget_on_a_real_cuda_device() -> None:
    memory = memory_budget("cuda:0", "256MiB")
    with memory:
        kept = torch.zeros(2**24, device="cuda:0")
        with pytest.raises(torch.OutOfMemoryError):
            torch.zeros(2**27, device="cuda:0")
        assert 2**26 <= memory.peak_bytes < 2**28
    assert len(torch.zeros(2**27, device="cuda:0")) == 2**27, "no limit after the block"
    assert kept.is_cuda
