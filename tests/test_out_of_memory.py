"""A step survives out-of-memory: at whichever allocation, it ends as if nothing had been, or changes
nothing."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tolerances
import torch
from out_of_memory import Failing
from reference.full_batch import (
    assert_close,
    assert_gradients_match,
    buffers_of,
    gradients_of,
)
from torch import Tensor, nn
from torch.nn import functional

from sbp_fast import StepResult, StreamedAccumulator

SAMPLES, SIZE, CLASSES = 14, 4, 3
EXACT = tolerances.STEP[torch.float64]

pytestmark = pytest.mark.filterwarnings("ignore:.*batch norm layers:UserWarning")


class Tied(nn.Module):
    """A weight that is used twice, one that is not used in every micro-batch, a buffer that moves."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 5), nn.Linear(5, CLASSES)
        self.rare = nn.Parameter(torch.ones(5))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += x.detach().sum()
        hidden = torch.tanh(self.first(torch.tanh(self.first(x))))
        chosen = x[:, :1] > 1.0
        if bool(chosen.any()):
            hidden = torch.where(chosen, hidden * self.rare, hidden)
        return self.second(hidden)


def with_batch_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, CLASSES))


def with_dropout() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.3), nn.Tanh(), nn.Linear(8, CLASSES))


def contrastive(outputs: Tensor, targets: Tensor) -> Tensor:
    features = functional.normalize(outputs, dim=1)
    similarity = features @ features.T / 0.5
    return functional.cross_entropy(similarity, targets.roll(1) % len(targets))


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[..., Tensor], dict[str, Any]]] = {
    "plain": (Tied, functional.cross_entropy, {}),
    "batch_norm": (with_batch_norm, functional.cross_entropy, {}),
    "dropout": (with_dropout, functional.cross_entropy, {}),
    "cross_sample": (Tied, contrastive, {"cross_sample_loss": True}),
    "cross_sample_batch_norm": (with_batch_norm, contrastive, {"cross_sample_loss": True}),
    "recompute": (with_dropout, functional.cross_entropy, {"activations": "recompute"}),
    "offload": (Tied, functional.cross_entropy, {"activations": "offload"}),
    "own_kernels": (Tied, functional.cross_entropy, {"backend": "reference"}),
}
STREAMED = pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])


def make(name: str) -> tuple[nn.Module, StreamedAccumulator]:
    build, loss_fn, options = CASES[name]
    torch.manual_seed(2)
    model = build().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return model, StreamedAccumulator(
        model, optimizer, loss_fn, micro_batch_size=SIZE, probe=False, **options
    )


@functools.cache
def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    return (
        torch.randn(SAMPLES, 5, generator=generator).double(),
        torch.randint(CLASSES, (SAMPLES,), generator=generator),
    )


def given(streamed: bool) -> tuple[Any, ...]:
    inputs, targets = batch()
    if not streamed:
        return inputs, targets

    def stream() -> Iterator[tuple[Tensor, Tensor]]:
        """Fills one buffer again and again."""
        x, y = torch.empty(7, 5).double(), torch.empty(7, dtype=torch.int64)
        for start in range(0, SAMPLES, 7):
            x.copy_(inputs[start : start + 7])
            y.copy_(targets[start : start + 7])
            yield x, y

    return (stream(),)


def run(name: str, streamed: bool, memory: Failing) -> tuple[nn.Module, StepResult]:
    model, accumulator = make(name)
    torch.manual_seed(9)
    with memory:
        return model, accumulator.backward(*given(streamed))


def state_of(model: nn.Module) -> list[Tensor | None]:
    gradients = [p.grad for p in model.parameters()]
    return [*(t.clone() for t in model.state_dict().values()), *gradients]


def same(left: list[Tensor | None], right: list[Tensor | None]) -> bool:
    return all(
        a is b or (a is not None and b is not None and torch.equal(a, b))
        for a, b in zip(left, right, strict=True)
    )


@pytest.mark.parametrize("name", CASES)
@STREAMED
def test_at_every_allocation(name: str, streamed: bool) -> None:
    batch()  # not among the allocations
    undisturbed, expected = run(name, streamed, memory := Failing())
    allocations, survived = memory.allocations, 0
    assert allocations > 50
    for number in range(allocations):
        model, accumulator = make(name)
        before = state_of(model)
        torch.manual_seed(9)
        random_state = torch.get_rng_state()
        memory = Failing(number)
        try:
            with memory:
                result = accumulator.backward(*given(streamed))
        except torch.OutOfMemoryError:
            assert same(state_of(model), before), number
            assert torch.equal(torch.get_rng_state(), random_state), number
            continue
        assert memory.failed == 1
        survived += 1
        assert_gradients_match(gradients_of(model), gradients_of(undisturbed), EXACT)
        for key, value in buffers_of(undisturbed).items():
            torch.testing.assert_close(buffers_of(model)[key], value, rtol=EXACT, atol=EXACT)
        assert_close(result.loss, expected.loss, EXACT)
        assert_close(result.grad_norm, expected.grad_norm, EXACT)
        assert result.samples == SAMPLES
        assert result.micro_batches > expected.micro_batches
        assert result.micro_batch_size <= SIZE
    # Only before the first micro-batch and after the last one is there nothing smaller to try.
    assert survived > 0.7 * allocations, (survived, allocations)


@pytest.mark.parametrize("name", CASES)
@STREAMED
@pytest.mark.parametrize("seed", range(4))
def test_again_and_again(name: str, streamed: bool, seed: int) -> None:
    """Pieces fail as well, and pieces of pieces."""
    batch()
    undisturbed, expected = run(name, streamed, memory := Failing())
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randperm(memory.allocations, generator=generator)[:3].tolist()
    model, accumulator = make(name)
    before = state_of(model)
    torch.manual_seed(9)
    try:
        with Failing(*numbers):
            result = accumulator.backward(*given(streamed))
    except torch.OutOfMemoryError:
        assert same(state_of(model), before)
        return
    assert_gradients_match(gradients_of(model), gradients_of(undisturbed), EXACT)
    assert_close(result.loss, expected.loss, EXACT)
    assert_close(result.grad_norm, expected.grad_norm, EXACT)


@pytest.mark.parametrize("name", CASES)
@STREAMED
def test_an_exception_of_the_users_changes_nothing(name: str, streamed: bool) -> None:
    """In the model, whichever micro-batch it comes in."""
    for call in range(1, 5):
        model, accumulator = make(name)
        calls: list[int] = []

        def fail(*_: Any, call: int = call, calls: list[int] = calls) -> None:
            calls.append(1)
            if len(calls) == call:
                raise ZeroDivisionError

        list(model.modules())[-1].register_forward_hook(fail)
        before = state_of(model)
        torch.manual_seed(9)
        random_state = torch.get_rng_state()
        with pytest.raises(ZeroDivisionError):
            accumulator.step(*given(streamed))
        assert same(state_of(model), before)
        assert torch.equal(torch.get_rng_state(), random_state)
