"""Takes times of several contenders side by side.

A machine's speed drifts: clocks change, neighbours come and go. So contenders take turns, once per round
and each round in another order, and are compared round by round: a ratio of two times taken
milliseconds apart keeps its meaning where a ratio of two averages does not.
"""

from __future__ import annotations

import gc
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

# One call of a contender. The argument counts its calls, so that it can go round several buffers.
Call = Callable[[int], object]

# Runs a function and returns how long the device took, in milliseconds.
Stopwatch = Callable[[Callable[[], None]], float]


# 25 ms and more at 2 GHz. Queuing a call of the kernel benchmarks takes a few, in Python; 644 launches,
# the most, fit in the queue at once.
_SLEEP_CYCLES = 50_000_000


@dataclass(frozen=True)
class Spread:
    """Figures of one quantity over all rounds, in the order of the rounds."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def minimum(self) -> float:
        return min(self.values)

    @property
    def maximum(self) -> float:
        return max(self.values)

    @property
    def interquartile_range(self) -> float:
        """The width of the middle half; 0 for a single value."""
        if len(self.values) < 2:
            return 0.0
        lower, _, upper = statistics.quantiles(self.values, n=4, method="inclusive")
        return upper - lower

    def over(self, other: Spread) -> Spread:
        """This divided by ``other``, round by round.

        Raises:
            ValueError: the rounds differ in number.
        """
        if len(self.values) != len(other.values):
            raise ValueError(
                f"{len(self.values)} rounds cannot be divided by {len(other.values)} rounds; "
                "measure both in one call"
            )
        return Spread(tuple(a / b for a, b in zip(self.values, other.values, strict=True)))

    def times(self, factor: float) -> Spread:
        return Spread(tuple(value * factor for value in self.values))


def measure(
    contenders: Mapping[str, Call],
    stopwatch: Stopwatch,
    *,
    rounds: int,
    calls: int = 1,
    warm_up: int = 1,
) -> dict[str, Spread]:
    """The time of one call of each contender, in milliseconds, over ``rounds`` rounds.

    Args:
        calls: how many calls make one measurement, for calls too short for a clock.
        warm_up: rounds that do not count.

    Raises:
        ValueError: no contenders, or fewer than one round or call.
    """
    if not contenders or rounds < 1 or calls < 1:
        raise ValueError(
            f"{len(contenders)} contenders, {rounds} rounds and {calls} calls were asked for; "
            "at least one of each is needed"
        )
    names = list(contenders)
    counts = dict.fromkeys(names, 0)
    times: dict[str, list[float]] = {name: [] for name in names}

    def repeat(name: str) -> None:
        call, first = contenders[name], counts[name]
        for count in range(first, first + calls):
            call(count)
        counts[name] = first + calls

    with _no_garbage_collection():
        for position in range(-warm_up, rounds):
            turn = position % len(names)
            for name in names[turn:] + names[:turn]:
                milliseconds = stopwatch(lambda name=name: repeat(name)) / calls  # type: ignore[misc]
                if position >= 0:
                    times[name].append(milliseconds)
    return {name: Spread(tuple(values)) for name, values in times.items()}


def stopwatch_for(device: torch.device, *, host_counts: bool = True) -> Stopwatch:
    """The clock for calls on ``device``: CUDA events there, the processor's own clock elsewhere.

    Args:
        host_counts: on CUDA, whether the time in which the device waits for the host to prepare and
            launch its work is part of the figure: so for what a caller waits for, not for kernels.
    """
    if device.type != "cuda":
        return _time_on_host
    return _time_on_cuda if host_counts else _time_kernels_on_cuda


def _time_on_host(function: Callable[[], None]) -> float:
    start = time.perf_counter_ns()
    function()
    return (time.perf_counter_ns() - start) / 1e6


def _time_on_cuda(function: Callable[[], None]) -> float:
    start = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    function()
    end.record()
    end.synchronize()
    milliseconds: float = start.elapsed_time(end)
    return milliseconds


def _time_kernels_on_cuda(function: Callable[[], None]) -> float:
    """As :func:`_time_on_cuda`, the host's part left out.

    On an idle stream the first event would pass at once, and what the host then does before its first
    launch (argument checks, tables) would count. Behind a sleep, all work is queued before it passes.
    """
    start = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    torch.cuda._sleep(_SLEEP_CYCLES)
    start.record()
    function()
    end.record()
    if start.query():
        warnings.warn(
            "the device was done sleeping before its work was queued: the figure contains time in "
            "which it waited for the host",
            stacklevel=2,
        )
    end.synchronize()
    milliseconds: float = start.elapsed_time(end)
    return milliseconds


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
