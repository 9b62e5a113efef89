"""Memory that runs out in the optimizer's own step: nothing has changed, or the error says what has."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from out_of_memory import Failing
from torch import Tensor, nn
from torch.nn import functional

from sbp_fast import StreamedAccumulator

OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1}),
    "adamw": (torch.optim.AdamW, {}),
    "adamw_for_loop": (torch.optim.AdamW, {"foreach": False}),
    "adam_without_decay": (torch.optim.Adam, {"foreach": False}),
    "adamw_fused": (torch.optim.AdamW, {"fused": True}),
    "rmsprop": (torch.optim.RMSprop, {"foreach": True}),
}


class FailingUpdate:
    """An optimizer whose step runs out of memory at one allocation."""

    def __init__(self, optimizer: torch.optim.Optimizer, number: int | None) -> None:
        self.memory = Failing() if number is None else Failing(number)
        native = optimizer.step

        def step(*args: Any, **kwargs: Any) -> Any:
            with self.memory:
                return native(*args, **kwargs)

        optimizer.step = step  # type: ignore[method-assign]


def make(name: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    kind, options = OPTIMIZERS[name]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    return model, kind(model.parameters(), lr=0.1, **options)


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(7, 3, generator=generator).double()
    return inputs, torch.randint(2, (7,), generator=generator)


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Any]:
    gradients = [p.grad for p in model.parameters()]
    return copy.deepcopy([model.state_dict(), optimizer.state_dict(), gradients])


def equal(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor):
        return isinstance(right, Tensor) and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(equal(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(equal, left, right))
    return bool(left == right)


@pytest.mark.parametrize("steps_before", [0, 2])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_at_every_allocation_of_the_update(name: str, steps_before: int) -> None:
    def fail_at(number: int | None) -> tuple[int, str, bool]:
        """How many allocations there are, the error, and whether all is as before."""
        model, optimizer = make(name)
        accumulator = StreamedAccumulator(
            model, optimizer, functional.cross_entropy, micro_batch_size=3
        )
        for _ in range(steps_before):
            accumulator.step(*batch())
        before = everything(model, optimizer)
        failing = FailingUpdate(optimizer, number)
        try:
            accumulator.step(*batch())
        except torch.OutOfMemoryError as error:
            return (
                failing.memory.allocations,
                str(error),
                equal(everything(model, optimizer), before),
            )
        return failing.memory.allocations, "", False

    allocations, error, _ = fail_at(None)
    assert not error
    said_unchanged = 0
    for number in range(allocations):
        _, error, unchanged = fail_at(number)
        assert "out of memory in the optimizer's step" in error
        if "nothing was updated" in error:
            assert unchanged, (number, error)
            said_unchanged += 1
        else:
            assert "go on from a checkpoint" in error
    # Four parameters have their state made one after the other. The first has no other to differ from.
    makes_state_first = steps_before == 0 and name != "sgd"
    assert said_unchanged >= (3 if makes_state_first else 0)


def test_state_that_was_just_made_goes() -> None:
    model, optimizer = make("adamw")
    accumulator = StreamedAccumulator(
        model, optimizer, functional.cross_entropy, micro_batch_size=3
    )
    FailingUpdate(optimizer, 3)
    with pytest.raises(torch.OutOfMemoryError, match="nothing was updated"):
        accumulator.step(*batch())
    assert len(optimizer.state) == 0


def test_other_errors_stay_what_they_are() -> None:
    class Refusing(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            raise ZeroDivisionError

    model, _ = make("sgd")
    optimizer = Refusing(model.parameters(), lr=0.1)
    accumulator = StreamedAccumulator(
        model, optimizer, functional.cross_entropy, micro_batch_size=3
    )
    with pytest.raises(ZeroDivisionError):
        accumulator.step(*batch())
