"""What ``batch_norm="exact"`` cannot do, and what goes wrong in the middle of it: an error that names the
place and the cure, and nothing has changed.
"""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import tolerances
import torch
from reference.full_batch import assert_gradients_match, buffers_of, full_batch, gradients_of
from reference.running_statistics import assert_buffers_match
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import batch_norm
from torch.utils.checkpoint import checkpoint
from unchanged import State

from sbp_fast import StreamedAccumulator

SAMPLES, MICRO = 10, 4
# Which of the three micro-batches goes wrong, by its first sample.
WHERE = pytest.mark.parametrize("first", [0, 4, 8], ids=["first", "middle", "last"])
MARK = 99.0


class Net(nn.Module):
    """Two batch norms; what it does beside depends on whether its samples are marked."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 8, bias=False)
        self.early, self.late = nn.BatchNorm1d(8), nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 4)
        self.activations: list[weakref.ref[Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        marked = bool((x == MARK).any())
        hidden = self.stem(x)
        self.activations.append(weakref.ref(hidden))
        return self.head(self.middle(hidden, marked))

    def middle(self, x: Tensor, marked: bool) -> Tensor:
        return torch.tanh(self.late(torch.tanh(self.early(x))))


def vectors(samples: int = SAMPLES) -> tuple[Tensor, Tensor]:
    return torch.randn(samples, 6, dtype=torch.float64), torch.randint(4, (samples,))


def marked_vectors(first: int) -> tuple[Tensor, Tensor]:
    inputs, targets = vectors()
    inputs[first, 0] = MARK
    return inputs, targets


class Trainer:
    """A model some steps into its training, with a gradient left from the last backward."""

    def __init__(self, model: nn.Module, loss_fn: Callable[..., Any] | None = None) -> None:
        self.model = model.double()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.accumulator = StreamedAccumulator(
            self.model,
            self.optimizer,
            functional.cross_entropy if loss_fn is None else loss_fn,
            micro_batch_size=MICRO,
            normalization="auto" if loss_fn is None else "mean",
            batch_norm="exact",
        )
        self.accumulator.step(*vectors())
        self.accumulator.backward(*vectors())
        self.state = State(self.model, self.optimizer)

    def check_unchanged_and_able_to_go_on(self) -> None:
        self.state.check()
        assert torch.is_grad_enabled()
        inputs, targets = vectors()
        # Where a model recomputes, torch itself would update running statistics again.
        plain = copy.deepcopy(self.model)
        plain.recompute = False
        oracle = full_batch(plain, functional.cross_entropy, inputs, targets)
        self.accumulator.backward(inputs, targets)
        bound = tolerances.STEP[torch.float64]
        assert_gradients_match(gradients_of(self.model), oracle.gradients, bound)
        assert_buffers_match(buffers_of(self.model), oracle.buffers, bound)
        assert not self.accumulator.step(inputs, targets).skipped


def naming(*parts: str) -> str:
    """A pattern for a message that holds all of these."""
    return "(?s)" + "".join(f"(?=.*{part})" for part in parts)


# --- One value per channel ----------------------------------------------------------------------


@pytest.mark.parametrize("method", ["step", "backward"])
def test_one_value_per_channel(method: str) -> None:
    trainer = Trainer(Net())
    with pytest.raises(ValueError, match=naming("early", "1 value per channel", "eval()")):
        getattr(trainer.accumulator, method)(*vectors(1))
    trainer.check_unchanged_and_able_to_go_on()


def test_one_value_per_channel_and_micro_batch_is_enough() -> None:
    trainer = Trainer(Net())
    inputs, targets = vectors(4)
    oracle = full_batch(trainer.model, functional.cross_entropy, inputs, targets)
    pieces = zip(inputs.split(1), targets.split(1), strict=True)
    trainer.accumulator.backward(iter(pieces))
    assert_gradients_match(
        gradients_of(trainer.model), oracle.gradients, tolerances.STEP[torch.float64]
    )


# --- Micro-batches that do not go the same way --------------------------------------------------


class Swapped(Net):
    def middle(self, x: Tensor, marked: bool) -> Tensor:
        norms = (self.late, self.early) if marked else (self.early, self.late)
        for norm in norms:
            x = torch.tanh(norm(x))
        return x


class Skipped(Net):
    def middle(self, x: Tensor, marked: bool) -> Tensor:
        x = torch.tanh(self.early(x))
        return x if marked else torch.tanh(self.late(x))


class Repeated(Net):
    def middle(self, x: Tensor, marked: bool) -> Tensor:
        x = super().middle(x, marked)
        return self.late(x) if marked else x


class Frozen(Net):
    """Sets a layer to eval mode for some of the data."""

    def middle(self, x: Tensor, marked: bool) -> Tensor:
        self.early.train(not marked)
        try:
            return super().middle(x, marked)
        finally:
            self.early.train()


@pytest.mark.parametrize(
    ("kind", "layers"),
    [
        (Swapped, ("early", "late")),
        (Skipped, ("late",)),
        (Repeated, ("late",)),
        (Frozen, ("early", "late")),
    ],
)
@WHERE
def test_different_ways(kind: type[Net], layers: tuple[str, ...], first: int) -> None:
    trainer = Trainer(kind())
    cure = "batch_norm='micro_batch'"
    with pytest.raises(RuntimeError, match=naming(*layers, "micro-batch", cure)):
        trainer.accumulator.step(*marked_vectors(first))
    trainer.check_unchanged_and_able_to_go_on()


# --- Out of reach -------------------------------------------------------------------------------


class ImportedByName(Net):
    """Calls the function under a name of its own, which nobody can answer in its place."""

    def middle(self, x: Tensor, marked: bool) -> Tensor:
        return batch_norm(torch.tanh(self.early(x)), None, None, training=True)


def test_a_function_imported_by_name_is_refused() -> None:
    model = ImportedByName().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    accumulator = StreamedAccumulator(
        model, optimizer, functional.cross_entropy, micro_batch_size=MICRO, batch_norm="exact"
    )
    state = State(model, optimizer)
    cure = "batch_norm='micro_batch'"
    with pytest.raises(RuntimeError, match=naming("torch.nn.functional.batch_norm", cure)):
        accumulator.step(*vectors())
    state.check()


# --- A model that raises ------------------------------------------------------------------------


class Raises(Net):
    """Raises at a place between its batch norms, if its samples are marked."""

    def __init__(self, place: str, error: BaseException) -> None:
        super().__init__()
        self.place, self.error = place, error
        self.entered, self.left = 0, 0

    def middle(self, x: Tensor, marked: bool) -> Tensor:
        self.entered += 1
        try:
            self.perhaps_raise("before", marked)
            x = torch.tanh(self.early(x))
            self.perhaps_raise("between", marked)
            x = torch.tanh(self.late(x))
            self.perhaps_raise("after", marked)
        finally:
            self.left += 1
        if marked and self.place == "backward":
            x.register_hook(lambda _: self.perhaps_raise("backward", True))
        return x

    def perhaps_raise(self, place: str, marked: bool) -> None:
        if marked and place == self.place:
            raise self.error


class RaisesUnderNoGrad(Raises):
    def middle(self, x: Tensor, marked: bool) -> Tensor:
        with torch.no_grad():
            super().middle(x, marked)
        return super().middle(x, False)


class RaisesCheckpointed(Raises):
    recompute = True

    def middle(self, x: Tensor, marked: bool) -> Tensor:
        if not self.recompute:
            return super().middle(x, marked)
        return checkpoint(super().middle, x, marked, use_reentrant=False)


class RaisesUnderAutocast(Raises):
    def middle(self, x: Tensor, marked: bool) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().middle(x, marked)


KINDS = [Raises, RaisesUnderNoGrad, RaisesCheckpointed, RaisesUnderAutocast]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", ["before", "between", "after"])
@WHERE
def test_a_model_that_raises(kind: type[Raises], place: str, first: int) -> None:
    trainer = Trainer(kind(place, LookupError("mine")))
    with pytest.raises(LookupError, match="mine"):
        trainer.accumulator.step(*marked_vectors(first))
    assert not torch.is_autocast_enabled("cpu")
    # Those that were waiting at a batch norm have left as well, through their finally.
    assert trainer.model.left == trainer.model.entered
    trainer.check_unchanged_and_able_to_go_on()


@pytest.mark.parametrize("kind", [Raises, RaisesCheckpointed])
@WHERE
def test_a_backward_pass_that_raises(kind: type[Raises], first: int) -> None:
    trainer = Trainer(kind("backward", LookupError("mine")))
    with pytest.raises(LookupError, match="mine"):
        trainer.accumulator.step(*marked_vectors(first))
    trainer.check_unchanged_and_able_to_go_on()


def test_an_interrupt() -> None:
    trainer = Trainer(Raises("between", KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        trainer.accumulator.step(*marked_vectors(4))
    trainer.check_unchanged_and_able_to_go_on()


@WHERE
def test_a_loss_that_raises(first: int) -> None:
    armed: list[int] = []

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        if armed:
            if armed[0] == 0:
                armed.clear()
                raise LookupError("mine")
            armed[0] -= 1
        return functional.cross_entropy(outputs, targets)

    trainer = Trainer(Net(), loss_fn)
    armed.append(first // MICRO)
    with pytest.raises(LookupError, match="mine"):
        trainer.accumulator.step(*vectors())
    trainer.check_unchanged_and_able_to_go_on()


def test_what_failed_keeps_no_memory() -> None:
    model = Raises("between", LookupError("mine"))
    trainer = Trainer(model)
    model.activations.clear()
    with pytest.raises(LookupError, match="mine"):
        trainer.accumulator.step(*marked_vectors(8))
    model.error = LookupError("its traceback holds the frames of the failed step")
    gc.collect()
    assert len(model.activations) == 3
    assert not any(activation() is not None for activation in model.activations)


def test_what_succeeded_keeps_no_memory() -> None:
    model = Net()
    trainer = Trainer(model)
    trainer.accumulator.step(*vectors())
    gc.collect()
    assert model.activations
    assert not any(activation() is not None for activation in model.activations)


def test_a_step_that_is_skipped() -> None:
    trainer = Trainer(Net())
    inputs, targets = vectors()
    inputs[5, 2] = float("inf")
    assert trainer.accumulator.step(inputs, targets).skipped
    trainer.check_unchanged_and_able_to_go_on()


# --- What is torch's own stays so ---------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True], ids=["after_a_step", "after_an_error"])
def test_the_model_is_its_own_again(fails: bool) -> None:
    trainer = Trainer(Raises("between", LookupError("mine")))
    functions = (functional.batch_norm, torch.batch_norm, nn.BatchNorm1d.forward)
    attributes = [sorted(vars(module)) for module in trainer.model.modules()]
    if fails:
        with pytest.raises(LookupError, match="mine"):
            trainer.accumulator.step(*marked_vectors(4))
    else:
        trainer.accumulator.step(*vectors())
    assert functions == (functional.batch_norm, torch.batch_norm, nn.BatchNorm1d.forward)
    assert attributes == [sorted(vars(module)) for module in trainer.model.modules()]
    norm, x = trainer.model.early, torch.randn(5, 8, dtype=torch.float64)
    expected = (x - x.mean(0)) * (x.var(0, correction=0) + norm.eps).rsqrt()
    torch.testing.assert_close(norm(x), expected * norm.weight + norm.bias)
