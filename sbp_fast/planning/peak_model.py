"""Peaks of device memory as a function of the micro-batch size."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import replace

from .choice import even_sizes
from .peak import Peak, Reading

# With a third micro-batch a step has everything that it will have: sums from the first, one that
# computes, and one that is sent ahead. Where something of each stays until all have come, two have met
# all the same, and what further ones add is the same for each.
_STEADY, _STEADY_TOGETHER = 3, 2
# Where lines begin: far enough from one another to see a slope, and small enough for any batch.
_FIRST_SIZES = (2, 8)


class PeakModel:
    """The peak of a step for every micro-batch size: read at some, on lines between and beyond them.

    Args:
        batch_size: samples in the large batch.
        read: ``read(micro_batch_size, samples)``: what a step on so many samples needs.
        waits_for_all: whether something of each micro-batch stays until all have come.
        first_sizes: micro-batch sizes through which lines are drawn at first.
    """

    def __init__(
        self,
        batch_size: int,
        read: Callable[[int, int], Reading],
        waits_for_all: bool,
        first_sizes: tuple[int, int] = _FIRST_SIZES,
    ) -> None:
        self.batch_size = batch_size
        self._read = read
        self._waits_for_all = waits_for_all
        self._first_sizes = first_sizes
        self._steady = _STEADY_TOGETHER if waits_for_all else _STEADY
        # By number of micro-batches, then by their size.
        self._readings: dict[int, dict[int, Reading]] = {}

    def count(self, micro_batch_size: int) -> int:
        """Micro-batches in the large batch."""
        return -(-self.batch_size // micro_batch_size)

    def is_measured(self, micro_batch_size: int) -> bool:
        """Whether :meth:`predict` has nothing to assume for this size."""
        return all(
            micro_batch_size in self._readings.get(count, {})
            for count in self._counts(micro_batch_size)
        )

    def measure(self, micro_batch_size: int) -> Peak:
        """The peak at this size, from steps of this size.

        Raises:
            ValueError: a size that is not from 1 to the batch size.
        """
        self._check(micro_batch_size)
        for count in self._counts(micro_batch_size):
            self._read_once(micro_batch_size, count)
        return self.predict(micro_batch_size)

    def predict(self, micro_batch_size: int) -> Peak:
        """The peak at this size, on lines through the nearest sizes that have been measured.

        Raises:
            ValueError: a size that is not from 1 to the batch size.
        """
        self._check(micro_batch_size)
        steady, *one_more = (
            self._on_the_line(micro_batch_size, count) for count in self._counts(micro_batch_size)
        )
        if not one_more:
            return steady.peak()
        reading = steady.towards(one_more[0], self.count(micro_batch_size) - self._steady)
        # The last micro-batch may be smaller, and what waits is of all.
        samples = self.batch_size / micro_batch_size
        waiting = steady.towards(one_more[0], samples - self._steady).host_peak
        return replace(reading, host_peak=waiting).peak()

    def largest_within(self, budget: int) -> int | None:
        """The largest micro-batch size whose peak is within so many bytes; None where there is none.

        Of the sizes that differ in their number of micro-batches, the smallest for each number: they
        make the same steps with the least memory. It has been measured; those above are predicted, or
        have been measured, not to be within the budget.
        """
        while True:
            size = next((size for size in self._sizes() if self._fits(size, budget)), None)
            if size is None:
                size, peak = self.smallest_peak()
                if peak.device_bytes > budget:
                    return None
            if self.is_measured(size):
                return size
            self.measure(size)

    def smallest_peak(self) -> tuple[int, Peak]:
        """The micro-batch size that needs the least, and its peak, measured. Not always 1: with exact
        batch norm, every micro-batch leaves its statistics on the device.
        """
        while True:
            size = min(self._sizes(), key=lambda size: self.predict(size).device_bytes)
            if self.is_measured(size):
                return size, self.predict(size)
            self.measure(size)

    def _sizes(self) -> list[int]:
        return even_sizes(self.batch_size)

    def _fits(self, size: int, budget: int) -> bool:
        return self.predict(size).device_bytes <= budget

    def _counts(self, size: int) -> list[int]:
        """For which numbers of micro-batches readings are needed."""
        count = self.count(size)
        if count <= self._steady:
            return [count]
        return [self._steady, self._steady + 1] if self._waits_for_all else [self._steady]

    def _on_the_line(self, size: int, count: int) -> Reading:
        if count == 1:
            # Of the whole batch there is but one size.
            return self._read_once(size, count)
        readings = self._readings.setdefault(count, {})
        if size in readings:
            return readings[size]
        for first in self._first_sizes:
            if len(readings) < len(self._first_sizes):
                self._read_once(first, count)
        sizes = sorted(readings)
        above = min(max(bisect_left(sizes, size), 1), len(sizes) - 1)
        left, right = sizes[above - 1], sizes[above]
        return readings[left].towards(readings[right], (size - left) / (right - left))

    def _read_once(self, size: int, count: int) -> Reading:
        readings = self._readings.setdefault(count, {})
        if size not in readings:
            is_all = count <= self._steady and count == self.count(size)
            readings[size] = self._read(size, self.batch_size if is_all else count * size)
        return readings[size]

    def _check(self, micro_batch_size: int) -> None:
        if not 1 <= micro_batch_size <= self.batch_size:
            raise ValueError(
                f"micro_batch_size is {micro_batch_size}; it must be from 1 to {self.batch_size}, the "
                "samples of the large batch"
            )
