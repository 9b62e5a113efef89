"""What was declared of a loss is compared with what it does: once, on a few samples, without a trace."""

from __future__ import annotations

import copy
import random
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tolerances
import torch
from reference.full_batch import (
    assert_close,
    assert_gradients_match,
    full_batch,
    gradients_of,
    total_norm,
)
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from sbp_fast import StepResult, StreamedAccumulator
from sbp_fast.rehearsal import Rehearsal

SAMPLES, LOOKED_AT, POSITIONS, CLASSES = 11, 5, 7, 4
CPU = torch.device("cpu")
# Nothing else looks at the samples then.
PROBE_ALONE = {"batch_norm": "micro_batch", "dropout": "native"}
SPLITS = pytest.mark.parametrize("micro_batch_size", [1, 4, SAMPLES])
STREAMED = pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])

# Batch norm is there to be disturbed.
pytestmark = pytest.mark.filterwarnings("ignore:.*batch norm layers:UserWarning")


class Tokens(nn.Module):
    """Logits of shape (samples, classes, positions). Counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.calls = nn.Linear(POSITIONS, CLASSES * POSITIONS), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.layer(x).unflatten(1, (CLASSES, POSITIONS))


class OwnLoss(Tokens):
    def __init__(self, loss_fn: Callable[..., Tensor], wrapping: str = "key") -> None:
        super().__init__()
        self.loss_fn, self.wrapping = loss_fn, wrapping

    def forward(self, x: Tensor, labels: Tensor) -> Any:
        loss = self.loss_fn(super().forward(x), labels)
        return {"tensor": loss, "key": {"loss": loss, "extra": x}}[self.wrapping]


def batch() -> tuple[Tensor, Tensor]:
    """Ragged: the first two samples have most labels, one has none. Losses of all sizes."""
    labels = torch.randint(CLASSES, (SAMPLES, POSITIONS))
    lengths = torch.tensor([7, 6, 1, 0, 2, 7, 1, 3, 6, 2, 4])
    return 4 * torch.randn(SAMPLES, POSITIONS), labels.masked_fill(
        torch.arange(POSITIONS) >= lengths[:, None], -100
    )


def token_mean(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(outputs, targets)


def token_sum(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(outputs, targets, reduction="sum")


def sample_mean(outputs: Tensor, targets: Tensor) -> Tensor:
    losses = functional.cross_entropy(outputs, targets, reduction="none")
    return (losses.sum(1) / (targets != -100).sum(1).clamp(min=1)).mean()


def class_weighted(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(outputs, targets, CLASS_WEIGHTS.to(outputs.dtype))


def own_denominator(targets: Tensor) -> Tensor:
    return (CLASS_WEIGHTS[targets.clamp(min=0)] * (targets != -100)).sum()


def info_nce(outputs: Tensor, targets: Tensor) -> Tensor:
    """Tells each sample's two halves from those of all other samples."""
    left, right = functional.normalize(outputs.flatten(1).unflatten(1, (2, -1)), dim=2).unbind(1)
    return functional.cross_entropy(left @ right.T / 0.1, torch.arange(len(outputs)))


def once(targets: Tensor) -> float:
    """The classic bug: the number of micro-batches as the denominator."""
    return 1.0


CLASS_WEIGHTS = torch.tensor([0.1, 1.0, 5.0, 20.0], dtype=torch.float64)

CALLABLE = "or it divides by something of its own (pass a callable that returns it"
CONTRASTIVE = "compares samples with one another (contrastive losses; pass cross_sample_loss=True)"
TOKENS, MEAN, SUM = (f"; pass normalization={name!r}. If" for name in ("tokens", "mean", "sum"))

# loss, what is wrongly declared, what the error says would be right
WRONG: dict[str, tuple[Callable[..., Tensor], Any, str]] = {
    "tokens_as_mean": (token_mean, "mean", TOKENS),
    "tokens_as_sum": (token_mean, "sum", TOKENS),
    "tokens_as_number_of_pieces": (token_mean, once, TOKENS),
    "mean_as_tokens": (sample_mean, "tokens", MEAN),
    "mean_as_sum": (sample_mean, "sum", MEAN),
    "sum_as_mean": (token_sum, "mean", SUM),
    "sum_as_tokens": (token_sum, "tokens", SUM),
    "sum_as_callable": (token_sum, own_denominator, SUM),
    "weighted_as_mean": (class_weighted, "mean", CALLABLE),
    "weighted_as_tokens": (class_weighted, "tokens", CALLABLE),
    "contrastive_as_mean": (info_nce, "mean", CONTRASTIVE),
    "contrastive_as_sum": (info_nce, "sum", CONTRASTIVE),
    "tokens_as_inverse_sqrt": (
        token_mean,
        "inverse_sqrt",
        "it takes a loss that cannot be read for a mean over samples; make it one, or pass "
        "normalization='tokens', without the square root",
    ),
}
# loss, what is rightly declared
RIGHT: dict[str, tuple[Callable[..., Tensor], Any]] = {
    "tokens": (token_mean, "tokens"),
    "tokens_by_callable": (token_mean, lambda targets: (targets != -100).sum()),
    "mean": (sample_mean, "mean"),
    "sum": (token_sum, "sum"),
    "weighted_by_callable": (class_weighted, own_denominator),
    "inverse_sqrt": (sample_mean, "inverse_sqrt"),
}
EVERY_WRONG = pytest.mark.parametrize(
    ("loss_fn", "declared", "words"), WRONG.values(), ids=WRONG.keys()
)
EVERY_RIGHT = pytest.mark.parametrize(("loss_fn", "declared"), RIGHT.values(), ids=RIGHT.keys())


def accumulator_for(
    model: nn.Module, loss_fn: Any, declared: Any, micro_batch_size: int = 4, **options: Any
) -> StreamedAccumulator:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return StreamedAccumulator(
        model,
        optimizer,
        loss_fn,
        micro_batch_size=micro_batch_size,
        normalization=declared,
        **options,
    )


def given(inputs: Tensor, targets: Tensor, streamed: bool, size: int = 6) -> tuple[Any, ...]:
    """The batch as arguments of a step, or as one iterable of items."""
    if not streamed:
        return inputs, targets
    return (zip(inputs.split(size), targets.split(size), strict=True),)


def same_bits(left: Tensor | None, right: Tensor | None) -> bool:
    if left is None or right is None:
        return left is right
    as_bytes = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (left, right)]
    return left.dtype == right.dtype and torch.equal(*as_bytes)


def random_states() -> tuple[Any, ...]:
    numpy = np.random.get_state(legacy=False)["state"]
    return (
        torch.get_rng_state().tolist(),
        random.getstate(),
        numpy["key"].tolist(),
        numpy["pos"],
    )


class Snapshot:
    """All of a model that a rehearsal must leave bitwise as it was, and the random numbers."""

    def __init__(self, model: nn.Module) -> None:
        self.tensors = {name: value.detach().clone() for name, value in model.state_dict().items()}
        self.gradients = gradients_of(model)
        self.flags = [module.training for module in model.modules()]
        self.random = random_states()

    def check(self, other: Snapshot) -> None:
        assert list(self.tensors) == list(other.tensors)
        for name, value in self.tensors.items():
            assert same_bits(value, other.tensors[name]), name
        for name, gradient in self.gradients.items():
            assert same_bits(gradient, other.gradients[name]), name
        assert self.flags == other.flags
        assert self.random == other.random


def check_no_trace(
    model: nn.Module,
    loss_fn: Any,
    make_batch: Callable[[], tuple[Any, ...]],
    declared: Any = "mean",
    **options: Any,
) -> None:
    """Two steps with the probe are bitwise those without."""
    twin = copy.deepcopy(model)
    snapshots, losses = [], []
    for probe, one in ((True, model), (False, twin)):
        torch.manual_seed(1)
        random.seed(1)
        np.random.seed(1)
        accumulator = accumulator_for(one, loss_fn, declared, probe=probe, **options)
        losses += [accumulator.step(*make_batch()).loss, accumulator.backward(*make_batch()).loss]
        snapshots.append(Snapshot(one))
    assert same_bits(losses[0], losses[2])
    assert same_bits(losses[1], losses[3])
    snapshots[0].check(snapshots[1])


class TestWrongDeclarations:
    @EVERY_WRONG
    @SPLITS
    @STREAMED
    def test_is_named_before_anything_changes(
        self,
        loss_fn: Callable[..., Tensor],
        declared: Any,
        words: str,
        micro_batch_size: int,
        streamed: bool,
    ) -> None:
        model, (inputs, targets) = Tokens(), batch()
        accumulator = accumulator_for(model, loss_fn, declared, micro_batch_size)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        before = Snapshot(model)
        looked_at = inputs[:LOOKED_AT], targets[:LOOKED_AT]
        whole = float(
            loss_fn(model.layer(looked_at[0]).detach().unflatten(1, (CLASSES, -1)), looked_at[1])
        )
        # The next step finds the same, and so does backward.
        for method in (accumulator.step, accumulator.step, accumulator.backward):
            with pytest.raises(ValueError, match="does not fit loss_fn=") as caught:
                method(*given(inputs, targets, streamed))
            message = str(caught.value)
            assert words in message
            assert message.startswith(
                f"normalization={getattr(declared, '__name__', repr(declared))} "
            )
            assert f"the first 5 samples have the loss {whole:.6g} at once, but " in message
            before.check(Snapshot(model))

    def test_both_figures(self) -> None:
        """The second is what the accumulator makes of the parts."""
        model, (inputs, targets) = Tokens().double(), batch()
        inputs = inputs[:LOOKED_AT].double()
        losses = [token_mean(model(inputs[r]), targets[r]) for r in (slice(0, 2), slice(2, 5))]
        expected = float((2 * losses[0] + 3 * losses[1]).detach()) / 5
        with pytest.raises(ValueError, match=rf"but {expected:.6g} when .* from 2 \+ 3 of them"):
            accumulator_for(model, token_mean, "mean").step(inputs, targets[:LOOKED_AT])

    @pytest.mark.parametrize(("samples", "parts"), [(2, "1 + 1"), (3, "1 + 2"), (4, "1 + 3")])
    def test_fewer_samples(self, samples: int, parts: str) -> None:
        inputs, targets = batch()
        with pytest.raises(ValueError, match=f"the first {samples} .* {re.escape(parts)} of"):
            accumulator_for(Tokens(), token_mean, "mean").step(inputs[:samples], targets[:samples])

    def test_normalizations_that_are_equal_here(self) -> None:
        """Without anything ignored, these samples do not tell tokens from samples."""
        inputs, targets = batch()
        with pytest.raises(
            ValueError, match="pass normalization='mean' or 'tokens', which are the same for these"
        ):
            accumulator_for(Tokens(), token_mean, "sum").step(inputs, targets.clamp(min=0))

    @pytest.mark.parametrize("wrapping", ["tensor", "key"])
    @STREAMED
    def test_of_a_model_with_its_own_loss(self, wrapping: str, streamed: bool) -> None:
        model, (x, labels) = OwnLoss(token_mean, wrapping), batch()
        whole = {"x": x, "labels": labels}
        items = [{name: rows[:6] for name, rows in whole.items()}]
        accumulator = accumulator_for(model, None, "mean")
        with pytest.raises(
            ValueError,
            match=r"does not fit a model that returns its own loss: .*; pass .*='tokens'",
        ):
            accumulator.step(iter(items) if streamed else whole)

    @pytest.mark.parametrize("how", ["autocast", "ambient", "bfloat16", "float16"])
    @pytest.mark.parametrize("own_loss", [False, True], ids=["loss_fn", "own_loss"])
    def test_in_16_bits(self, how: str, own_loss: bool) -> None:
        model, (x, labels) = OwnLoss(token_mean) if own_loss else Tokens(), batch()
        autocast = torch.bfloat16 if how == "autocast" else None
        if how in ("bfloat16", "float16"):
            dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}[how]
            model, x = model.to(dtype), x.to(dtype)
        accumulator = accumulator_for(
            model, None if own_loss else token_mean, "mean", autocast=autocast
        )
        arguments = ({"x": x, "labels": labels},) if own_loss else (x, labels)
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=how == "ambient"),
            pytest.raises(ValueError, match="; pass normalization='tokens'"),
        ):
            accumulator.step(*arguments)

    @pytest.mark.parametrize("how", ["float32", "autocast", "ambient", "bfloat16"])
    def test_where_all_losses_are_nearly_equal(self, how: str) -> None:
        """As they are before a model has learnt anything: the figures differ by less than 16 bits."""
        model, (inputs, targets) = Tokens(), batch()
        nn.init.normal_(model.layer.weight, std=1e-4)
        nn.init.zeros_(model.layer.bias)
        if how == "bfloat16":
            model, inputs = model.bfloat16(), inputs.bfloat16()
        autocast = torch.bfloat16 if how == "autocast" else None
        accumulator = accumulator_for(model, token_mean, "mean", autocast=autocast)
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=how == "ambient"),
            pytest.raises(ValueError, match=r"; pass normalization='tokens'\."),
        ):
            accumulator.step(inputs, targets)

    @pytest.mark.parametrize("how", ["autocast", "ambient"])
    def test_under_autocast_in_the_precision_of_the_parameters(self, how: str) -> None:
        model, (x, labels) = OwnLoss(token_mean), batch()
        nn.init.normal_(model.layer.weight, std=1e-3)
        nn.init.zeros_(model.layer.bias)
        autocast = torch.bfloat16 if how == "autocast" else None
        accumulator = accumulator_for(model, None, "mean", autocast=autocast)
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=how == "ambient"),
            pytest.raises(ValueError, match=r"; pass normalization='tokens'\.") as caught,
        ):
            accumulator.step({"x": x, "labels": labels})
        at_once, added_up = map(float, re.findall(r"(\d\.\d+) (?:at once|when)", str(caught.value)))
        expected = model(x[:LOOKED_AT], labels[:LOOKED_AT])["loss"]
        assert at_once == pytest.approx(expected.item(), rel=5e-6)  # the digits that are shown
        assert 1e-3 < abs(at_once - added_up) / at_once < 3e-2

    def test_a_model_that_needs_its_autocast(self) -> None:
        """Its inputs are in 16 bits, its parameters are not."""
        inputs, targets = batch()
        accumulator = accumulator_for(Tokens(), token_mean, "mean", autocast=torch.bfloat16)
        with pytest.raises(ValueError, match="; pass normalization='tokens'"):
            accumulator.step(inputs.bfloat16(), targets)

    def test_targets_in_which_tokens_cannot_be_counted(self) -> None:
        inputs, targets = plain_batch()
        accumulator = accumulator_for(
            nn.Linear(POSITIONS, CLASSES), lambda y, t: token_mean(y, t["class"]), "sum"
        )
        with pytest.raises(ValueError, match=r"; pass normalization='mean'\. If"):
            accumulator.step(inputs, {"class": targets})

    @pytest.mark.parametrize("hidden", [False, True], ids=["sliced", "run"])
    def test_of_a_loss_that_writes_to_what_it_is_given(self, hidden: bool) -> None:
        def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
            targets += 1
            return functional.cross_entropy(outputs.mul_(2), targets)

        inputs, targets = plain_batch()
        targets.clamp_(max=CLASSES - 3)
        kept = targets.clone()
        model = Hiding() if hidden else nn.Linear(POSITIONS, CLASSES)
        calls: list[int] = []
        model.register_forward_hook(lambda *_: calls.append(1))
        accumulator = accumulator_for(
            model, unhidden(loss_fn) if hidden else loss_fn, "sum", **PROBE_ALONE
        )
        with pytest.raises(ValueError, match="; pass normalization='mean'"):
            accumulator.step(inputs, targets)
        assert same_bits(targets, kept)
        assert len(calls) == (2 + 2 + 4 if hidden else 2)

    def test_a_sample_that_counts_nothing(self) -> None:
        """Its mean is NaN, by which the right normalization does not let itself be hidden."""
        inputs, targets = batch()
        targets[:2] = -100
        with pytest.raises(ValueError, match=r"but nan when .*; pass normalization='tokens'"):
            accumulator_for(Tokens(), token_mean, "mean").step(inputs, targets)


class TestRightDeclarations:
    @EVERY_RIGHT
    @SPLITS
    @STREAMED
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
    def test_pass(
        self,
        loss_fn: Callable[..., Tensor],
        declared: Any,
        micro_batch_size: int,
        streamed: bool,
        dtype: torch.dtype,
    ) -> None:
        model, (inputs, targets) = Tokens().to(dtype), batch()
        inputs = inputs.to(dtype)
        factor = SAMPLES**-0.5 if declared == "inverse_sqrt" else 1.0
        oracle = full_batch(model, loss_fn, inputs, targets, factor)
        accumulator = accumulator_for(model, loss_fn, declared, micro_batch_size)
        result = accumulator.backward(*given(inputs, targets, streamed))
        assert_gradients_match(gradients_of(model), oracle.gradients, tolerances.STEP[dtype])
        assert_close(result.loss, oracle.loss, tolerances.STEP[dtype])

    @EVERY_RIGHT
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("own_loss", [False, True], ids=["loss_fn", "own_loss"])
    def test_in_16_bits(
        self, loss_fn: Callable[..., Tensor], declared: Any, dtype: torch.dtype, own_loss: bool
    ) -> None:
        x, labels = batch()
        for seed in range(3):
            torch.manual_seed(seed)
            for autocast in (None, dtype):
                model = OwnLoss(loss_fn) if own_loss else Tokens()
                model = model if autocast else model.to(dtype)
                inputs = x if autocast else x.to(dtype)
                weigh = declared
                if own_loss and callable(declared):
                    weigh = lambda inputs: declared(inputs["labels"])  # noqa: E731
                accumulator = accumulator_for(
                    model, None if own_loss else loss_fn, weigh, autocast=autocast
                )
                arguments = ({"x": inputs, "labels": labels},) if own_loss else (inputs, labels)
                assert not accumulator.step(*arguments).skipped

    def test_a_loss_that_takes_no_float64(self) -> None:
        """Its weights are in float32; it is still the outputs of one forward that are sliced."""
        model, (inputs, targets) = Tokens(), batch()
        weights = CLASS_WEIGHTS.float()
        accumulator = accumulator_for(
            model,
            lambda y, t: functional.cross_entropy(y, t, weights),
            own_denominator,
            **PROBE_ALONE,
        )
        accumulator.step(inputs, targets)
        assert model.calls == 2 + 2 + 3

    def test_losses_that_nearly_cancel(self) -> None:
        """What is left of them is their rounding errors."""

        class Signed(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x).mean()

        inputs = torch.tensor([1e4, 2e4, -1e4, -2e4, 0.0])[:, None] + torch.rand(5, 3)
        for seed in range(5):
            torch.manual_seed(seed)
            accumulator_for(Signed(3, 1), None, "mean").step(inputs)

    @pytest.mark.parametrize(
        ("dtype", "rounding"), [(torch.float32, 2.0**-12), (torch.bfloat16, 2.0**-7)], ids=str
    )
    def test_another_number_of_samples_may_be_rounded_otherwise(
        self, dtype: torch.dtype, rounding: float
    ) -> None:
        """As by another algorithm of a convolution."""

        class Rounding(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                outputs = super().forward(x)
                outputs = outputs * (1 + rounding) if len(x) == LOOKED_AT else outputs
                return outputs.float().square().mean()

        model = Rounding(POSITIONS, CLASSES).to(dtype)
        accumulator_for(model, None, "mean").step(plain_batch()[0].to(dtype))

    def test_outputs_without_tensors(self) -> None:
        """Nothing to slice: the loss takes its tensors elsewhere."""

        class Silent(nn.Linear):
            def forward(self, x: Tensor) -> None:
                self.said = super().forward(x)

        model = Silent(POSITIONS, CLASSES)
        accumulator_for(model, lambda *_: model.said.square().sum(), "sum").step(*plain_batch())

    @pytest.mark.parametrize("rows", [LOOKED_AT, 2])
    def test_outputs_beside_the_samples(self, rows: int) -> None:
        """Rows that are no samples, even if they are as many."""

        class Prototypes(nn.Linear):
            def forward(self, x: Tensor) -> Any:
                return {"y": super().forward(x), "all": self.weight}

        def loss_fn(outputs: Any, targets: Tensor) -> Tensor:
            return functional.mse_loss(outputs["y"], targets) + outputs["all"].square().sum()

        model = Prototypes(3, rows)
        accumulator_for(model, loss_fn, "mean").step(torch.randn(9, 3), torch.randn(9, rows))
        with pytest.raises(ValueError, match="normalization='sum' does not fit"):
            accumulator_for(model, loss_fn, "sum").step(torch.randn(9, 3), torch.randn(9, rows))

    def test_an_output_without_dimensions(self) -> None:
        class Scaled(nn.Linear):
            def forward(self, x: Tensor) -> Any:
                return super().forward(x), x.new_tensor(2.0)

        accumulator = accumulator_for(
            Scaled(POSITIONS, CLASSES), lambda y, t: token_mean(y[0] * y[1], t), "sum"
        )
        with pytest.raises(ValueError, match="pass normalization='mean'"):
            accumulator.step(*plain_batch())

    def test_outputs_that_hide_their_tensors(self) -> None:
        """They are not sliced: the model runs on the parts."""
        loss_fn = unhidden(lambda logits, _: logits.square().sum())
        accumulator_for(Hiding(), loss_fn, "sum").step(*plain_batch())
        with pytest.raises(ValueError, match="pass normalization='sum'"):
            accumulator_for(Hiding(), loss_fn, "mean").step(*plain_batch())

    def test_time_first(self) -> None:
        """As many steps in time as there are samples."""

        class Recurrent(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.rnn = nn.GRU(3, 4)

            def forward(self, x: Tensor) -> Tensor:
                return self.rnn(x.transpose(0, 1))[0]

        def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
            return functional.cross_entropy(outputs[-1], targets)

        inputs, targets = torch.randn(9, LOOKED_AT, 3), torch.randint(4, (9,))
        accumulator_for(Recurrent(), loss_fn, "mean").step(inputs, targets)
        with pytest.raises(ValueError, match="normalization='sum' does not fit"):
            accumulator_for(Recurrent(), loss_fn, "sum").step(inputs, targets)

    def test_outputs_as_a_pytree_of_numpy_inputs(self) -> None:
        class Nested(Tokens):
            def forward(self, x: Tensor) -> Any:
                return {"logits": (super().forward(x), None), "name": "tokens"}

        def loss_fn(outputs: Any, targets: Any) -> Tensor:
            return token_mean(outputs["logits"][0], targets["labels"])

        inputs, targets = batch()
        model = Nested()
        arguments = inputs.numpy(), {"labels": targets.numpy()}
        accumulator_for(model, loss_fn, "tokens", **PROBE_ALONE).step(*arguments)
        assert model.calls == 2 + 3  # the outputs of one forward were sliced
        with pytest.raises(ValueError, match="pass normalization='tokens'"):
            accumulator_for(model, loss_fn, "mean").step(*arguments)


class Disturbed(nn.Module):
    """Everything that a forward can leave a trace in."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.dropout = nn.BatchNorm1d(POSITIONS), nn.Dropout()
        self.frozen = nn.Sequential(nn.BatchNorm1d(POSITIONS), nn.Dropout())
        self.layer = nn.Linear(POSITIONS, CLASSES)
        self.register_buffer("average", torch.zeros(POSITIONS))
        self.register_buffer("replaced", torch.zeros(()))
        self.frozen.eval()

    def train(self, mode: bool = True) -> Disturbed:
        raise AssertionError("train() and eval() are the user's")

    def forward(self, x: Tensor) -> Tensor:
        x -= 0.5
        self.average.lerp_(x.detach().mean(0), 0.1)
        self.replaced = self.replaced + 1
        if not hasattr(self, "late"):
            self.register_buffer("late", x.detach().mean(0))
        factor = 1 + random.random() + float(np.random.rand())
        return self.layer(self.frozen(self.dropout(self.norm(x)))) * factor


class DisturbedOwnLoss(Disturbed):
    def forward(self, x: Tensor, labels: Tensor) -> Any:
        if self.training:
            x = x + torch.rand_like(x)
        else:
            x -= 0.5
        labels += 1
        labels %= CLASSES
        self.average.lerp_(x.detach().mean(0), 0.1)
        self.replaced = self.replaced + 1
        loss = functional.cross_entropy(self.layer(self.dropout(self.norm(x))), labels)
        return {"loss": loss}


def plain_batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(SAMPLES, POSITIONS, generator=generator)
    return inputs, torch.randint(CLASSES, (SAMPLES,), generator=generator)


class Hiding(nn.Linear):
    """Outputs whose tensors nobody sees."""

    def __init__(self) -> None:
        super().__init__(POSITIONS, CLASSES)

    def forward(self, x: Tensor) -> Any:
        return {"hidden": SimpleNamespace(logits=super().forward(x)), "x": x}


def unhidden(loss_fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda outputs, targets: loss_fn(outputs["hidden"].logits, targets)


class TestNoTrace:
    @pytest.mark.parametrize("micro_batch_size", [3, SAMPLES])
    @pytest.mark.parametrize("how", ["plain", "autocast", "ambient"])
    @STREAMED
    def test_a_step_is_bitwise_the_same(
        self, micro_batch_size: int, how: str, streamed: bool
    ) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "ambient"):
            check_no_trace(
                Disturbed(),
                token_mean,
                lambda: given(*plain_batch(), streamed),
                micro_batch_size=micro_batch_size,
                autocast=torch.bfloat16 if how == "autocast" else None,
            )

    def test_of_a_model_with_its_own_loss(self) -> None:
        def whole() -> tuple[dict[str, Tensor]]:
            inputs, labels = plain_batch()
            return ({"x": inputs, "labels": labels},)

        check_no_trace(DisturbedOwnLoss(), None, whole)

    def test_of_a_wrong_declaration(self) -> None:
        """Where the model ran in eval mode as well."""
        model, (inputs, targets) = Disturbed(), plain_batch()
        kept = inputs.clone()
        before = Snapshot(model)
        buffers = dict(model.named_buffers())
        with pytest.raises(ValueError, match="normalization='sum' does not fit"):
            accumulator_for(model, token_mean, "sum").step(inputs, targets)
        before.check(Snapshot(model))
        assert all(buffer is buffers[name] for name, buffer in model.named_buffers())
        assert same_bits(inputs, kept)

    def test_of_a_loss_with_buffers(self) -> None:
        """Each part is measured against the same centre, although every call moves it."""

        class Centred(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.register_buffer("centre", torch.zeros(CLASSES))

            def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
                loss = functional.cross_entropy(outputs - self.centre, targets)
                self.centre.lerp_(outputs.detach().mean(0), 0.9)
                return loss

        loss_fn, (inputs, targets) = Centred(), plain_batch()
        model = nn.Linear(POSITIONS, CLASSES)
        with pytest.raises(ValueError, match="pass normalization='mean'"):
            accumulator_for(model, loss_fn, "sum").step(inputs, targets)
        assert same_bits(loss_fn.centre, torch.zeros(CLASSES))
        accumulator_for(model, loss_fn, "mean").step(inputs, targets)

    def test_of_a_loss_that_writes_to_what_it_is_given(self) -> None:
        def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
            targets += 1
            return functional.cross_entropy(outputs, targets)

        check_no_trace(
            nn.Linear(POSITIONS, CLASSES),
            loss_fn,
            lambda: (plain_batch()[0], plain_batch()[1].clamp(max=CLASSES - 2)),
        )

    def test_warnings(self, recwarn: pytest.WarningsRecorder) -> None:
        """Without gradients, a checkpoint would warn that it has none."""

        class Checkpointed(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                return checkpoint(super().forward, x, use_reentrant=True)

        model = nn.Sequential(nn.Linear(POSITIONS, 3), Checkpointed(3, CLASSES))
        accumulator_for(model, token_mean, "mean").step(*plain_batch())
        assert not [str(w.message) for w in recwarn if "requires_grad" in str(w.message)]

    @pytest.mark.parametrize("own_loss", [False, True], ids=["loss_fn", "own_loss"])
    def test_a_compiled_model_is_compiled_for_its_micro_batches_alone(self, own_loss: bool) -> None:
        class Compiled(nn.Linear):
            def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
                outputs = super().forward(x)
                return outputs if labels is None else functional.cross_entropy(outputs, labels)

        compiled: list[int] = []

        def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
            compiled.append(1)
            return graph.forward

        torch.compiler.reset()
        model = torch.compile(Compiled(POSITIONS, CLASSES), backend=backend)
        inputs, labels = (rows[:8] for rows in plain_batch())
        accumulator = accumulator_for(model, None if own_loss else token_mean, "mean")
        accumulator.step(*([{"x": inputs, "labels": labels}] if own_loss else [inputs, labels]))
        assert len(compiled) == 1
        assert all(module.training for module in model.modules())

    def test_an_interruption(self) -> None:
        model = Disturbed()
        before = Snapshot(model)

        def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
            assert not torch.is_grad_enabled()
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            accumulator_for(model, loss_fn, "mean").step(*plain_batch())
        before.check(Snapshot(model))
        assert torch.is_grad_enabled()


class TestRehearsal:
    def test_everything_is_as_before(self) -> None:
        model = Disturbed()
        model.layer.weight.grad = torch.ones(CLASSES, POSITIONS)
        before = Snapshot(model)
        with Rehearsal([model], CPU) as rehearsal:
            for _ in range(2):
                rehearsal.start_over()
                assert not rehearsal.has_drawn()
                assert not model(plain_batch()[0]).requires_grad
                assert int(model.norm.num_batches_tracked) == 1
                assert rehearsal.has_drawn()
            rehearsal.switch_to_eval()
            assert not any(module.training for module in model.modules())
            assert torch.is_warn_always_enabled()
            with torch.enable_grad():
                model(plain_batch()[0]).sum().backward()
        before.check(Snapshot(model))
        assert not torch.is_warn_always_enabled()

    def test_one_thread_at_a_time(self) -> None:
        """What a rehearsal quietens belongs to the process: the first to begin must not be the first to
        end."""
        filters = warnings.filters
        first_has_ended, second_has_begun = threading.Event(), threading.Event()

        def second() -> None:
            with Rehearsal([nn.Linear(1, 1)], CPU):
                second_has_begun.set()
                first_has_ended.wait()

        thread = threading.Thread(target=second, daemon=True)
        with Rehearsal([nn.Linear(1, 1)], CPU):
            thread.start()
            assert not second_has_begun.wait(0.2)
        first_has_ended.set()
        thread.join()
        assert warnings.filters is filters
        assert not torch.is_warn_always_enabled()

    @pytest.mark.parametrize("draw", [torch.rand, random.random, np.random.rand])
    def test_sees_every_generator(self, draw: Callable[..., Any]) -> None:
        with Rehearsal([nn.Linear(1, 1)], CPU) as rehearsal:
            draw(*[1] if draw is torch.rand else [])
            assert rehearsal.has_drawn()
            rehearsal.start_over()
            assert not rehearsal.has_drawn()


class TestOnce:
    def run(self, model: Any, loss_fn: Any = token_mean, **options: Any) -> list[int]:
        """How often each of three large batches calls the model, in three micro-batches."""
        accumulator = accumulator_for(model, loss_fn, "tokens", **{**PROBE_ALONE, **options})
        x, labels = batch()
        calls = []
        for method in (accumulator.backward, accumulator.step, accumulator.step):
            before = model.calls
            method(*((x, labels) if loss_fn is not None else ({"x": x, "labels": labels},)))
            calls.append(model.calls - before)
        return calls

    def test_two_forwards_for_outputs(self) -> None:
        assert self.run(Tokens()) == [3 + 2, 3, 3]

    def test_four_forwards_for_a_model_with_its_own_loss(self) -> None:
        assert self.run(OwnLoss(token_mean), None) == [3 + 4, 3, 3]

    def test_none_for_a_loss_that_was_read(self) -> None:
        model = Tokens()
        assert self.run(model, nn.CrossEntropyLoss()) == [3, 3, 3]

    def test_none_where_the_declaration_is_believed(self) -> None:
        assert self.run(Tokens(), probe=False) == [3, 3, 3]
        inputs, targets = batch()
        accumulator_for(Tokens(), token_mean, "mean", probe=False).step(inputs, targets)

    def test_it_waits_for_two_samples(self) -> None:
        """With which a large batch begins: in the middle of one it would come too late."""
        model, (inputs, targets) = Tokens(), batch()
        accumulator = accumulator_for(model, token_mean, "mean")
        accumulator.step(inputs[:1], targets[:1])
        accumulator.step(iter([(inputs[:1], targets[:1]), (inputs[1:5], targets[1:5])]))
        assert model.calls == 1 + 2
        with pytest.raises(ValueError, match="pass normalization='tokens'"):
            accumulator.step(inputs, targets)


class TestStreams:
    @pytest.mark.parametrize("micro_batch_size", [1, 2, 5])
    def test_a_generator_may_fill_one_buffer_again(self, micro_batch_size: int) -> None:
        model, (inputs, targets) = Tokens(), batch()
        targets = targets.clamp(min=0)
        oracle = full_batch(model, token_mean, inputs[:9], targets[:9])
        given_so_far: list[int] = []
        seen: list[int] = []
        model.layer.register_forward_pre_hook(lambda *_: seen.append(len(given_so_far)))

        def stream() -> Iterator[tuple[Tensor, Tensor]]:
            x, y = torch.empty(3, POSITIONS), torch.empty(3, POSITIONS, dtype=torch.int64)
            for start in range(0, 9, 3):
                x.copy_(inputs[start : start + 3])
                y.copy_(targets[start : start + 3])
                given_so_far.append(start)
                yield x, y

        accumulator = accumulator_for(model, token_mean, "tokens", micro_batch_size, **PROBE_ALONE)
        accumulator.backward(stream())
        assert_gradients_match(
            gradients_of(model), oracle.gradients, tolerances.STEP[torch.float32]
        )
        pieces = -(-3 // micro_batch_size)
        assert seen == [1] * (2 + pieces) + [2] * pieces + [3] * pieces


class TestNothingToCompare:
    """The step goes on, or says itself what is wrong; the log says why nothing was compared."""

    def step(
        self,
        caplog: pytest.LogCaptureFixture,
        reason: str,
        model: nn.Module,
        loss_fn: Any,
        arguments: tuple[Any, ...] | None = None,
        declared: Any = "sum",
    ) -> StepResult:
        accumulator = accumulator_for(model, loss_fn, declared, **PROBE_ALONE)
        inputs, targets = plain_batch()
        arguments = arguments or ((inputs, targets) if loss_fn else ((inputs, targets),))
        with caplog.at_level("INFO", logger="sbp_fast"):
            try:
                return accumulator.step(*arguments)
            finally:
                (record,) = caplog.records
                assert "the loss is not probed" in record.getMessage()
                assert reason in record.getMessage()

    def test_a_loss_that_raises(self, caplog: pytest.LogCaptureFixture) -> None:
        def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
            raise LookupError("mine")

        with pytest.raises(LookupError, match="mine") as caught:
            self.step(caplog, "LookupError: mine", Tokens(), loss_fn)
        assert caught.value.__context__ is None

    def test_a_model_that_raises(self, caplog: pytest.LogCaptureFixture) -> None:
        inputs, targets = torch.randn(SAMPLES, POSITIONS + 1), plain_batch()[1]
        with pytest.raises(RuntimeError, match="cannot be multiplied"):
            self.step(caplog, "cannot be mult", Tokens(), token_mean, (inputs, targets))

    def test_a_loss_that_is_no_scalar(self, caplog: pytest.LogCaptureFixture) -> None:
        with pytest.raises(ValueError, match=r"the loss has shape \(4,\); it must be a scalar"):
            self.step(caplog, "no scalar", nn.Linear(POSITIONS, 1), lambda y, _: y.squeeze(1))

    def test_not_a_number(self, caplog: pytest.LogCaptureFixture) -> None:
        inputs, targets = plain_batch()
        inputs[0] = torch.nan
        model = nn.Linear(POSITIONS, CLASSES)
        assert self.step(caplog, "is nan", model, token_mean, (inputs, targets)).skipped

    def test_not_a_number_in_a_part(self, caplog: pytest.LogCaptureFixture) -> None:
        """No normalization fits, but that may be for this part alone."""

        def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
            present = (targets != 0).float()
            return (outputs.square().mean(1) * present).sum() / present.sum()

        inputs, targets = plain_batch()
        targets[:2], targets[2:] = 0, 1
        targets[3] = 0
        model = nn.Linear(POSITIONS, CLASSES)
        self.step(caplog, "not finite", model, loss_fn, (inputs, targets), "mean")

    def test_nothing_but_zero(self, caplog: pytest.LogCaptureFixture) -> None:
        self.step(caplog, "is 0", Tokens(), lambda outputs, _: outputs.sum() * 0)

    def test_samples_that_weigh_nothing(self, caplog: pytest.LogCaptureFixture) -> None:
        inputs, targets = batch()
        targets[:LOOKED_AT] = -100

        def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
            return token_sum(outputs, targets) / (targets != -100).sum() + outputs.mean() * 0

        def smooth(outputs: Tensor, targets: Tensor) -> Tensor:
            return loss_fn(outputs, targets) if bool((targets != -100).any()) else outputs.mean()

        self.step(caplog, "weigh nothing", Tokens(), smooth, (inputs, targets), "tokens")

    @pytest.mark.parametrize("noise", [torch.randn, lambda *_: random.random()])
    def test_random_losses(self, caplog: pytest.LogCaptureFixture, noise: Any) -> None:
        """A variational autoencoder draws in eval mode, too, and other numbers for each split."""

        class Variational(Tokens):
            def forward(self, x: Tensor, labels: Tensor) -> Tensor:
                return (super().forward(x) + noise(len(x), 1, 1)).square().mean()

        self.step(caplog, "random numbers", Variational(), None)

    def test_a_loss_that_is_another_one_each_time(self, caplog: pytest.LogCaptureFixture) -> None:
        calls: list[int] = []

        def annealed(outputs: Tensor, targets: Tensor) -> Tensor:
            calls.append(1)
            return token_mean(outputs, targets) * len(calls)

        model = nn.Linear(POSITIONS, CLASSES)
        self.step(caplog, "another loss each time", model, annealed, declared="mean")

    def test_no_loss_in_eval_mode(self, caplog: pytest.LogCaptureFixture) -> None:
        class Detector(Tokens):
            def forward(self, x: Tensor, labels: Tensor) -> Any:
                outputs = super().forward(x)
                return {"loss": outputs.square().sum()} if self.training else [outputs]

        self.step(caplog, "the model returned a list", Detector(), None)


def test_a_wrong_declaration_is_another_gradient() -> None:
    """What the probe is there for, and that these batches would show it."""
    model, (inputs, targets) = Tokens().double(), batch()
    oracle = full_batch(model, token_mean, inputs.double(), targets)
    accumulator = accumulator_for(model, token_mean, "mean", probe=False)
    accumulator.backward(inputs.double(), targets)
    distance = {
        name: gradient - oracle.gradients[name]  # type: ignore[operator]
        for name, gradient in gradients_of(model).items()
    }
    assert total_norm(distance) > 0.05 * oracle.norm
