"""Micro-batches under ``batch_norm="exact"`` wait for one another in the middle of a model. What torch
keeps for the thread (grad mode, autocast, saved-tensor hooks, random numbers) is each one's own.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import tolerances
import torch
from reference.full_batch import assert_gradients_match, gradients_of
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sbp_fast import StreamedAccumulator

SAMPLES, MICRO = 12, 5


def accumulator_for(model: nn.Module) -> StreamedAccumulator:
    return StreamedAccumulator(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        nn.CrossEntropyLoss(),
        micro_batch_size=MICRO,
        batch_norm="exact",
    )


class Packs:
    """Saved-tensor hooks that tell whether they are in force."""

    def __init__(self) -> None:
        self.packed = 0

    def context(self) -> AbstractContextManager[Any]:
        return torch.autograd.graph.saved_tensors_hooks(self.pack, lambda tensor: tensor)

    def pack(self, tensor: Tensor) -> Tensor:
        self.packed += 1
        return tensor

    def in_force(self) -> bool:
        before = self.packed
        with torch.enable_grad():
            torch.ones((), requires_grad=True).square()
        return self.packed > before


PACKS = Packs()
CONTEXTS: dict[str, tuple[Callable[[], AbstractContextManager[Any]], Callable[[], Any]]] = {
    "no_grad": (torch.no_grad, torch.is_grad_enabled),
    "autocast": (
        lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        lambda: torch.is_autocast_enabled("cpu"),
    ),
    "saved_tensors_hooks": (PACKS.context, PACKS.in_force),
}


class Within(nn.Module):
    """A batch norm within a context, and one after it. ``seen``: what each sample's micro-batch saw of
    the context, from beginning to end."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.context, self.probe = CONTEXTS[name]
        self.stem, self.head = nn.Linear(6, 8), nn.Linear(8, 4)
        self.norm, self.norm2 = nn.BatchNorm1d(8), nn.BatchNorm1d(8)
        self.seen: dict[float, list[Any]] = {}

    def forward(self, x: Tensor) -> Tensor:
        seen = self.seen[float(x[0, 0])] = [self.probe()]
        hidden = self.stem(x)
        with self.context():
            seen.append(self.probe())
            hidden = hidden + self.norm(hidden)
            seen.append(self.probe())
        seen.append(self.probe())
        hidden = self.norm2(hidden)
        seen.append(self.probe())
        return self.head(self.stem(x) + hidden)


@pytest.mark.parametrize("name", CONTEXTS)
def test_a_context_is_the_micro_batchs_own(name: str) -> None:
    model = Within(name).double()
    inputs = torch.randn(SAMPLES, 6, dtype=torch.float64)
    accumulator_for(model).backward(inputs, torch.randint(4, (SAMPLES,)))
    outside = name == "no_grad"
    assert len(model.seen) == 3
    for seen in model.seen.values():
        assert seen == [outside, not outside, not outside, outside, outside]
    assert model.probe() == outside


class Dropping(nn.Module):
    """Random numbers are drawn behind a batch norm, and again where the block is recomputed."""

    def __init__(self, recompute: bool) -> None:
        super().__init__()
        self.recompute = recompute
        self.stem, self.head = nn.Linear(6, 8), nn.Linear(8, 4)
        self.block = nn.Sequential(
            nn.Dropout(0.3), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 8)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = checkpoint(self.block, x, use_reentrant=False) if self.recompute else self.block(x)
        return self.head(x)


def test_dropout_that_is_recomputed_behind_a_batch_norm_drops_the_same() -> None:
    inputs = torch.randn(SAMPLES, 6, dtype=torch.float64)
    targets = torch.randint(4, (SAMPLES,))
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = Dropping(recompute).double()
        accumulator_for(model).backward(inputs, targets)
        gradients.append(gradients_of(model))
    assert_gradients_match(gradients[1], gradients[0], tolerances.STEP[torch.float64])
