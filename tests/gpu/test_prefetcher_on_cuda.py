"""The native prefetcher on a CUDA device: what arrives, in which order, where, and what it costs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sbp_fast import StreamedAccumulator
from sbp_fast.batches import split
from sbp_fast.data import Rows
from sbp_fast.ops import native
from sbp_fast.streaming import Prefetcher, make_ring, stream_to

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

# About a tenth of a second.
LATE_CYCLES = 200_000_000
# Of the step, in which the device may do nothing (the figure).
MOST_BUBBLE = 0.01


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture
def ring(device: torch.device) -> Prefetcher:
    for usable, reason in (native.load_prefetch(), native.load_cuda()):
        if not usable:
            pytest.skip(reason)
    ring = make_ring(device)
    assert isinstance(ring, Prefetcher)
    return ring


@pytest.mark.sanitize
@pytest.mark.parametrize(
    "make",
    [
        lambda x: x,
        lambda x: x.pin_memory(),
        lambda x: x.pin_memory()[:, :2],
        lambda x: x[::2],
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: x.to(torch.uint8),
        lambda x: x.bfloat16(),
        lambda x: x[:, 0, 0, 0],
        lambda x: x.numpy()[::-1],
        lambda x: Rows(x, [8, 0, 8, 3, 1]),
    ],
)
@pytest.mark.parametrize("keep", [False, True])
def test_rows_arrive_as_they_are(
    make: Callable[[Tensor], Any], keep: bool, device: torch.device, ring: Prefetcher
) -> None:
    leaf = make(torch.randn(9, 3, 4, 5).abs() * 50)
    expected = leaf.gather() if isinstance(leaf, Rows) else leaf
    if isinstance(expected, np.ndarray):
        expected = torch.from_numpy(expected.copy())
    pieces = split(leaf, None, 2, with_targets=False)
    arrived = [a.micro_batch.inputs.cpu() for a in stream_to(device, pieces, ring, keep=keep)]
    assert torch.equal(torch.cat(arrived), expected)
    if isinstance(leaf, Tensor) and leaf.is_contiguous(memory_format=torch.channels_last):
        assert arrived[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("pinned", [False, True])
def test_a_computation_that_is_late(pinned: bool, device: torch.device, ring: Prefetcher) -> None:
    """The host is far ahead: slots are wanted again while the device still reads them, and a copy has
    just begun when the computation that needs it could."""
    x = torch.arange(12.0).repeat_interleave(1 << 20).reshape(12, -1)
    x = x.pin_memory() if pinned else x
    results = []
    for arrival in stream_to(device, split(x, None, 1, with_targets=False), ring):
        torch.cuda._sleep(LATE_CYCLES // 4)
        results.append(arrival.micro_batch.inputs.aminmax())
        del arrival
    assert [(low.item(), high.item()) for low, high in results] == [(n, n) for n in range(12)]


def test_pinned_memory_may_be_filled_again_afterwards(
    device: torch.device, ring: Prefetcher
) -> None:
    x = torch.ones(8, 1 << 20).pin_memory()
    sums = []
    for arrival in stream_to(device, split(x, None, 1, with_targets=False), ring):
        torch.cuda._sleep(LATE_CYCLES // 8)
        sums.append(arrival.micro_batch.inputs.sum())
        del arrival
    x.zero_()
    assert [total.item() for total in sums] == [1 << 20] * 8


def test_no_memory_is_allocated_after_the_first_step(device: torch.device) -> None:
    for usable, reason in (native.load_prefetch(), native.load_cuda()):
        if not usable:
            pytest.skip(reason)
    places: set[int] = set()
    model = nn.Linear(64, 4).to(device)
    model.register_forward_pre_hook(lambda _, inputs: places.add(inputs[0].data_ptr()))
    accumulator = StreamedAccumulator(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        nn.CrossEntropyLoss(),
        micro_batch_size=8,
        probe=False,
    )
    rows, labels = Rows(torch.randn(100, 64), torch.arange(40)), torch.zeros(40, dtype=torch.long)
    accumulator.step(rows, labels)
    assert len(places) == 2
    allocated = torch.cuda.memory_allocated()
    pinned = staging(accumulator)
    for _ in range(3):
        accumulator.step(rows, labels)
    assert len(places) == 2
    assert torch.cuda.memory_allocated() == allocated
    assert staging(accumulator) == pinned


def staging(accumulator: StreamedAccumulator) -> list[int]:
    ring = accumulator._ring
    assert isinstance(ring, Prefetcher)
    return [buffer.data_ptr() for slot in ring._slots for buffer in slot._staging]


def test_the_device_is_never_idle_while_copies_are_shorter_than_computations(
    device: torch.device, ring: Prefetcher, tmp_path: Path
) -> None:
    """From a trace: what lies between the kernels of a step, over the whole of it."""
    del ring  # the accumulator has its own
    width, micro, count = 4096, 2048, 6
    np.save(tmp_path / "x.npy", np.random.default_rng(0).random((micro * 4, width), np.float32))
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    index = torch.randint(0, len(mapped), (micro * count,))
    model = nn.Sequential(*(nn.Linear(width, width) for _ in range(12))).to(device)
    accumulator = StreamedAccumulator(
        model,
        torch.optim.SGD(model.parameters(), lr=1e-4),
        nn.MSELoss(),
        micro_batch_size=micro,
        probe=False,
    )
    inputs, targets = Rows(mapped, index), torch.zeros(micro * count, width, device=device)
    for _ in range(2):
        accumulator.backward(inputs, targets)
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        accumulator.backward(inputs, targets)
        torch.cuda.synchronize()
    kernels = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and "Memcpy HtoD" not in event.name
    )
    assert kernels
    begin, end = kernels[0]
    idle = 0.0
    for start, stop in kernels[1:]:
        idle += max(start - end, 0.0)
        end = max(end, stop)
    bubble = idle / (end - begin)
    print(f"bubble {bubble:.2%} of {(end - begin) / 1e3:.1f} ms")
    assert bubble < MOST_BUBBLE
