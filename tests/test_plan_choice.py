"""The micro-batch size with the shortest step, against trying all of them."""

from __future__ import annotations

import math
import random

import pytest

from sbp_fast.planning import best_micro_batch_size
from sbp_fast.planning.choice import even_sizes


def by_trying_all(batch: int, largest: int, alpha: float, beta: float) -> int:
    """Ties: the fewest micro-batches, then the smallest ones."""

    def key(size: int) -> tuple[float, int, int]:
        count = math.ceil(batch / size)
        return count * (alpha + beta * size), count, size

    return min(range(1, min(batch, largest) + 1), key=key)


@pytest.mark.parametrize("batch", [1, 2, 7, 12, 30, 97])
@pytest.mark.parametrize(
    ("alpha", "beta"), [(1.0, 1.0), (5.0, 0.25), (0.125, 4.0), (0.0, 1.0), (1.0, 0.0), (0.0, 0.0)]
)
def test_as_trying_all(batch: int, alpha: float, beta: float) -> None:
    for largest in range(1, batch + 3):
        expected = by_trying_all(batch, largest, alpha, beta)
        assert best_micro_batch_size(batch, largest, alpha, beta) == expected


def test_as_trying_all_on_random_times() -> None:
    for _ in range(300):
        batch = random.randint(1, 200)
        largest = random.randint(1, batch)
        # Powers of two add up without rounding, so ties are ties.
        alpha, beta = (2.0 ** random.randint(-4, 8) for _ in range(2))
        expected = by_trying_all(batch, largest, alpha, beta)
        assert best_micro_batch_size(batch, largest, alpha, beta) == expected


def test_without_times_the_fewest_micro_batches_and_then_the_smallest() -> None:
    for batch in (1, 10, 63, 64, 100):
        for largest in range(1, batch + 5):
            expected = by_trying_all(batch, largest, 1.0, 0.0)
            assert best_micro_batch_size(batch, largest) == expected
    assert best_micro_batch_size(1024, 565) == 512
    assert best_micro_batch_size(10, 9) == 5


def test_time_per_sample_can_outweigh_the_number_of_micro_batches() -> None:
    # 7 samples: two micro-batches of 4 compute 8 samples' worth of time, seven of one compute 7.
    assert best_micro_batch_size(7, 6, alpha=0.125, beta=1.0) == 1
    assert best_micro_batch_size(7, 6, alpha=1.0, beta=1.0) == 4


@pytest.mark.parametrize("batch", [1, 2, 9, 60, 1024])
def test_even_sizes_are_one_for_each_number_of_micro_batches(batch: int) -> None:
    smallest: dict[int, int] = {}
    for size in range(batch, 0, -1):
        smallest[math.ceil(batch / size)] = size
    assert even_sizes(batch) == sorted(smallest.values(), reverse=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 1), "batch_size is 0; it must be at least 1"),
        ((8, 0), "largest is 0; it must be at least 1"),
        ((8, 4, -1.0, 1.0), "alpha is -1.0; it must be a finite time"),
        ((8, 4, 1.0, math.nan), "beta is nan; it must be a finite time"),
        ((8, 4, 1.0, None), "alpha is 1.0 and beta is None; both are measured together"),
    ],
)
def test_what_is_refused(arguments: tuple[int, int, float, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        best_micro_batch_size(*arguments)
