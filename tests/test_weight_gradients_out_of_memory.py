"""Memory that runs out around weight gradients that are added by their matrix products: wholly in, or
wholly out; and the memory that they save."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import tolerances
import torch
from fused_layers import note_added
from out_of_memory import Failing
from reference.full_batch import assert_close, assert_gradients_match, full_batch, gradients_of
from torch import Tensor, nn
from torch.nn import functional

from sbp_fast import StreamedAccumulator
from sbp_fast.memory import memory_budget
from sbp_fast.planning import predict_peak

SAMPLES, SIZE, WIDTH, CLASSES = 6, 4, 8, 3
DEEP = 768
LAYER_BYTES = DEEP * DEEP * 4


class Mixed(nn.Module):
    """A layer that is called twice, one whose weight an embedding shares, and layers with one use."""

    def __init__(self) -> None:
        super().__init__()
        self.once, self.twice = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.embedding, self.shared = nn.Embedding(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.shared.weight = self.embedding.weight
        self.pixels = nn.Conv2d(WIDTH, 9, 1)
        self.last = nn.Linear(9, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.once(x))
        x = torch.tanh(self.twice(torch.tanh(self.twice(x))))
        x = torch.tanh(self.shared(x) + self.embedding(torch.arange(len(x)) % WIDTH * 0))
        return self.last(torch.tanh(self.pixels(x[:, :, None, None])).flatten(1))


def with_batch_norm() -> nn.Module:
    return nn.Sequential(
        *(nn.Linear(WIDTH, 6, bias=False), nn.BatchNorm1d(6), nn.Tanh()),
        nn.Linear(6, CLASSES),
    )


def contrastive(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(outputs @ outputs.T, targets)


CASES: dict[str, tuple[Callable[[], nn.Module], Any, dict[str, Any]]] = {
    "autograd": (Mixed, functional.cross_entropy, {}),
    "kernels": (Mixed, functional.cross_entropy, {"backend": "reference"}),
    "recompute": (Mixed, functional.cross_entropy, {"activations": "recompute"}),
    "batch_norm": (with_batch_norm, functional.cross_entropy, {}),
    "cross_sample": (Mixed, contrastive, {"cross_sample_loss": True}),
}


@pytest.mark.parametrize("name", CASES)
def test_at_every_allocation(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    added = note_added(monkeypatch)
    build, loss_fn, options = CASES[name]
    original = build().double()
    inputs, targets = torch.randn(SAMPLES, WIDTH).double(), torch.randint(CLASSES, (SAMPLES,))
    oracle = full_batch(copy.deepcopy(original), loss_fn, inputs, targets)
    bound = tolerances.STEP[torch.float64]

    def run(memory: Failing) -> None:
        model = copy.deepcopy(original)
        accumulator = StreamedAccumulator(
            model,
            torch.optim.SGD(model.parameters(), lr=0.1),
            loss_fn,
            micro_batch_size=SIZE,
            probe=False,
            **options,
        )
        with memory:
            result = accumulator.backward(inputs, targets)
        assert_gradients_match(gradients_of(model), oracle.gradients, bound)
        assert_close(result.grad_norm, oracle.norm, bound)

    run(memory := Failing())
    # Two micro-batches. In a model without batch norm, three of the five weights have one use.
    assert set(added.values()) == {2}
    assert len(added) == (2 if name == "batch_norm" else 3)
    survived = 0
    for number in range(memory.allocations):
        try:
            run(Failing(number))
            survived += 1
        except torch.OutOfMemoryError:
            continue
    assert survived > memory.allocations / 3


def deep() -> nn.Module:
    """Eight layers of 2.25 MiB."""
    return nn.Sequential(*(nn.Linear(DEEP, DEEP, bias=False) for _ in range(8)))


def counted_peak(backend: str) -> int:
    model, inputs = deep(), torch.randn(4, DEEP)
    accumulator = StreamedAccumulator(
        model,
        torch.optim.SGD(model.parameters(), lr=0.01, foreach=False),
        nn.MSELoss(),
        micro_batch_size=1,
        backend=backend,
    )
    with memory_budget("cpu", None) as memory:
        memory.track(model.parameters())
        accumulator.step(inputs, inputs)
        return memory.peak_bytes


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_no_gradient_is_alive_beside_the_sums(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused = counted_peak(backend)
    note_added(monkeypatch, least_bytes=2 * LAYER_BYTES)
    # Parameters and sums, and a few rows.
    assert 16 * LAYER_BYTES <= fused < 16.1 * LAYER_BYTES
    assert counted_peak(backend) - fused >= 0.9 * LAYER_BYTES


def test_a_plan_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    model, sample = deep(), (torch.randn(1, DEEP), torch.randn(1, DEEP))

    def planned() -> int:
        return predict_peak(
            *(model, nn.MSELoss(), sample),
            batch_size=4,
            device=torch.device("cpu"),
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.01, foreach=False),
            policy="keep",
        ).measure(1).device_bytes  # fmt: skip

    expected = pytest.approx(counted_peak("auto"), rel=tolerances.PLANNED_PEAK["cpu"])
    assert planned() == expected
    note_added(monkeypatch, least_bytes=2 * LAYER_BYTES)
    assert planned() != expected
