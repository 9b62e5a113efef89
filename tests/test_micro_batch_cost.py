"""Samples of different lengths: micro-batches of bounded cost, and the same step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import tolerances
import torch
from reference.full_batch import assert_close, assert_gradients_match, gradients_of
from torch import Tensor, nn
from torch.nn import functional

from sbp_fast import StreamedAccumulator

EXACT = tolerances.STEP[torch.float64]
VOCABULARY, LENGTHS = 11, (3, 9, 1, 4, 4, 7, 2, 8, 5, 1, 6)


class Tagger(nn.Module):
    """A label for each token, from the token and the mean of its sentence; notes what it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCABULARY, 6), nn.Linear(12, VOCABULARY)
        self.seen: list[Tensor] = []

    def forward(self, tokens: Tensor) -> Tensor:
        self.seen.append(tokens.clone())
        words = self.embedding(tokens)
        counts = (tokens != 0)[..., None]
        mean = (words * counts).sum(1, keepdim=True) / counts.sum(1, keepdim=True)
        return self.head(torch.cat([words, mean.expand_as(words)], -1)).transpose(1, 2)


def padded(lengths: tuple[int, ...] = LENGTHS) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
    for row, length in zip(tokens, lengths, strict=True):
        row[:length] = torch.randint(1, VOCABULARY, (length,), generator=generator)
    targets = torch.where(tokens == 0, -100, (tokens * 3 + 1) % VOCABULARY)
    return tokens, targets


def tokens_in(inputs: Any) -> int:
    return int((inputs != 0).sum())


def area(inputs: Tensor) -> int:
    return inputs.numel()


def make(**options: Any) -> tuple[Tagger, StreamedAccumulator]:
    torch.manual_seed(0)
    model = Tagger().double()
    accumulator = StreamedAccumulator(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        nn.CrossEntropyLoss(),
        probe=False,
        **options,
    )
    return model, accumulator


def expected() -> tuple[dict[str, Tensor], Tensor]:
    model, _ = make(micro_batch_size=1)
    tokens, targets = padded()
    loss = functional.cross_entropy(model(tokens), targets)
    loss.backward()  # type: ignore[no-untyped-call]
    return gradients_of(model), loss


def by_length(batch: tuple[Tensor, Tensor], size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Items of similar lengths, each as wide as its longest."""
    tokens, targets = batch
    order = torch.argsort((tokens != 0).sum(1))
    for rows in order.split(size):
        width = int((tokens[rows] != 0).sum(1).max())
        yield tokens[rows, :width], targets[rows, :width]


@pytest.mark.parametrize("bound", [9, 10, 13, 24, 50, 1000])
@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
def test_bounded_cost_and_exact_weights(bound: int, streamed: bool) -> None:
    model, accumulator = make(micro_batch_size=bound, micro_batch_cost=tokens_in)
    batch = (by_length(padded(), 4),) if streamed else padded()
    result = accumulator.backward(*batch)
    gradients, loss = expected()
    assert_gradients_match(gradients_of(model), gradients, EXACT)
    assert_close(result.loss, loss, EXACT)
    assert max(map(tokens_in, model.seen)) <= bound
    assert sum(map(tokens_in, model.seen)) == sum(LENGTHS)
    assert result.samples == len(LENGTHS)
    if not streamed:
        # As few as in-order pieces allow: each with the first sample of the next is too much.
        costs = [tokens_in(seen) for seen in model.seen]
        firsts = [tokens_in(seen[:1]) for seen in model.seen]
        assert all(a + b > bound for a, b in zip(costs, firsts[1:], strict=False))


def test_cost_that_counts_padding() -> None:
    """Items of a stream are cut by what they are wide."""
    model, accumulator = make(micro_batch_size=20, micro_batch_cost=area)
    accumulator.backward(by_length(padded(), 4))
    assert_gradients_match(gradients_of(model), expected()[0], EXACT)
    assert max(seen.numel() for seen in model.seen) <= 20
    assert {len(seen) for seen in model.seen} == {1, 2, 3, 4}


@pytest.mark.parametrize(
    "cost",
    [
        lambda inputs: (inputs != 0).sum(),
        lambda inputs: np.float32(tokens_in(inputs)),
        lambda inputs: tokens_in(inputs) / 1.5,
    ],
    ids=["tensor", "numpy", "float"],
)
def test_kinds_of_numbers(cost: Callable[[Tensor], Any]) -> None:
    model, accumulator = make(micro_batch_size=12, micro_batch_cost=cost)
    accumulator.backward(*padded())
    assert max(float(cost(seen)) for seen in model.seen) <= 12
    assert_gradients_match(gradients_of(model), expected()[0], EXACT)


def test_cost_of_a_structure() -> None:
    class TwoInputs(Tagger):
        def forward(self, tokens: Tensor, unused: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(tokens)

    torch.manual_seed(0)
    model = TwoInputs().double()
    accumulator = StreamedAccumulator(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        nn.CrossEntropyLoss(),
        probe=False,
        micro_batch_size=12,
        micro_batch_cost=lambda inputs: tokens_in(inputs["tokens"]),
    )
    tokens, targets = padded()
    accumulator.backward({"tokens": tokens, "unused": tokens.numpy()}, targets)
    assert_gradients_match(gradients_of(model), expected()[0], EXACT)
    assert max(map(tokens_in, model.seen)) <= 12


@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.parametrize(
    "options", [{}, {"cross_sample_loss": True}], ids=["plain", "cross_sample"]
)
def test_out_of_memory_halves_the_cost(call: int, options: dict[str, Any]) -> None:
    model, accumulator = make(micro_batch_size=24, micro_batch_cost=tokens_in, **options)
    tokens, targets = padded()

    def fail(*_: Any) -> None:
        if len(model.seen) == call:
            raise torch.OutOfMemoryError("out of memory")

    failing = model.register_forward_hook(fail)
    result = accumulator.backward(tokens, targets)
    failing.remove()
    assert_gradients_match(gradients_of(model), expected()[0], EXACT)
    assert result.samples == len(LENGTHS)
    # Later large batches keep to half of it, but for single samples.
    model.seen.clear()
    accumulator.backward(tokens, targets)
    assert all(tokens_in(seen) <= 12 or len(seen) == 1 for seen in model.seen)
    assert_gradients_match(gradients_of(model), expected()[0], EXACT)


def test_single_samples_beyond_what_memory_allows() -> None:
    """After out-of-memory with little, long samples still come, one at a time."""
    model, accumulator = make(
        micro_batch_size=9, micro_batch_cost=tokens_in, cross_sample_loss=True
    )
    tokens, targets = padded()

    def fail(*_: Any) -> None:
        if any(len(seen) > 1 for seen in model.seen[-1:]):
            raise torch.OutOfMemoryError("out of memory")

    model.register_forward_hook(fail)
    result = accumulator.backward(tokens, targets)
    assert result.micro_batch_size == 1
    assert_gradients_match(gradients_of(model), expected()[0], EXACT)


def test_a_sample_that_is_too_much() -> None:
    model, accumulator = make(micro_batch_size=8, micro_batch_cost=tokens_in)
    with pytest.raises(ValueError, match=r"sample 1 alone .*cost of 9, .* allows 8 at once; raise"):
        accumulator.step(*padded())
    assert not model.seen


@pytest.mark.parametrize(
    "cost", [0, -1.0, float("nan"), float("inf"), "3", None, True, torch.ones(2)]
)
def test_costs_that_are_none(cost: Any) -> None:
    _, accumulator = make(micro_batch_size=8, micro_batch_cost=lambda _: cost)
    with pytest.raises(ValueError, match=r"micro_batch_cost returned .* number greater than 0"):
        accumulator.step(*padded())


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match=r"micro_batch_cost is 7; it must be callable"):
        make(micro_batch_size=8, micro_batch_cost=7)
    with pytest.raises(ValueError, match=r"'auto' with a micro_batch_cost; give the most"):
        make(micro_batch_cost=tokens_in)
