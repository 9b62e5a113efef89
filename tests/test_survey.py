"""The look at a model on a few samples: where they are in it, and what escapes the step."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from sbp_fast import StreamedAccumulator
from sbp_fast.batches import MicroBatch
from sbp_fast.forward import Forward
from sbp_fast.invariance.layout import NO_SAMPLES, Layout, Layouts
from sbp_fast.invariance.survey import Survey

CPU = torch.device("cpu")
SAMPLES = 5


class Applied(nn.Module):
    """A function of a dropout layer and the inputs."""

    def __init__(
        self, function: Callable[[nn.Module, Tensor], Tensor], **modules: nn.Module
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.dropout = nn.Dropout(0.2)
        self.function = function
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, self.linear(x))


def survey(model: nn.Module, inputs: Any, *, exact: bool = True) -> tuple[Survey, Layouts]:
    layouts = Layouts()
    found = Survey(layouts, exact)
    found(
        Forward(model, lambda outputs, targets: outputs, nullcontext, False),
        MicroBatch(inputs, torch.zeros(SAMPLES), SAMPLES),
        CPU,
    )
    return found, layouts


# As many rows as samples in every dimension: a shape alone would tell nothing.
SQUARE = (SAMPLES, SAMPLES, 4)

LAYOUTS: dict[str, tuple[Callable[[Any, Tensor], Tensor], Layout]] = {
    "samples_first": (lambda m, x: m.dropout(x), Layout(0)),
    "sequence_first": (lambda m, x: m.dropout(x.transpose(0, 1)), Layout(1)),
    "channels_between": (lambda m, x: m.dropout(x.permute(2, 1, 0)), Layout(2)),
    "windows_in_the_batch": (lambda m, x: m.dropout(x.reshape(SAMPLES * 5, 4)), Layout(0)),
    "samples_in_turns": (
        lambda m, x: m.dropout(x.transpose(0, 1).reshape(5 * SAMPLES, 4)),
        Layout(0, in_turns=True),
    ),
    "weights": (lambda m, x: x + m.dropout(m.linear.weight).sum(), NO_SAMPLES),
    "positions": (lambda m, x: x + m.dropout(torch.ones(1, SAMPLES, 4)), NO_SAMPLES),
    "a_mask_of_infinities": (
        lambda m, x: m.dropout(x.masked_fill(x > 0, float("-inf"))).exp(),
        Layout(0),
    ),
}


class TestLayouts:
    @pytest.mark.parametrize("name", LAYOUTS)
    def test_are_recognised(self, name: str) -> None:
        function, expected = LAYOUTS[name]
        _, layouts = survey(Applied(function), torch.randn(SQUARE))
        assert layouts.recognised == {("dropout", 0): expected}

    def test_of_every_call(self) -> None:
        model = Applied(
            lambda m, x: m.dropout(m.dropout(x).transpose(0, 1)) + functional.dropout(x, 0.1)
        )
        _, layouts = survey(model, torch.randn(SQUARE))
        assert layouts.recognised == {
            ("dropout", 0): Layout(0),
            ("dropout", 1): Layout(1),
            ("Applied", 0): Layout(0),
        }

    def test_of_tokens(self) -> None:
        model = nn.Sequential(nn.Embedding(10, 4), nn.Dropout(0.1), nn.Linear(4, 2))
        _, layouts = survey(model, torch.randint(0, 10, (SAMPLES, 3)))
        assert layouts.recognised == {("1", 0): Layout(0)}

    def test_batch_norm_does_not_hide_them(self) -> None:
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.1))
        _, layouts = survey(model, torch.randn(SAMPLES, 4))
        assert layouts.recognised == {("2", 0): Layout(0)}

    def test_mixed_samples_are_not_recognised_and_the_error_says_what_to_do(self) -> None:
        model = Applied(lambda m, x: m.dropout(x + x.mean(0)))
        _, layouts = survey(model, torch.randn(SQUARE))
        assert layouts.recognised == {("dropout", 0): None}
        with pytest.raises(ValueError, match=r"'dropout' .* \(2, 3\).*declare_sample_dimension"):
            layouts.of(("dropout", 0), model.dropout, torch.zeros(2, 3), 2)

    def test_samples_that_are_all_alike_say_nothing(self) -> None:
        _, layouts = survey(Applied(lambda m, x: m.dropout(x)), torch.ones(SQUARE))
        assert layouts.recognised == {}

    def test_a_sample_like_the_first_is_not_the_one_that_is_replaced(self) -> None:
        inputs = torch.randn(SQUARE)
        inputs[1] = inputs[0]
        _, layouts = survey(Applied(lambda m, x: m.dropout(x.transpose(0, 1))), inputs)
        assert layouts.recognised == {("dropout", 0): Layout(1)}


class TestNamesWhatEscapes:
    def test_fused_attention(self) -> None:
        layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.1, batch_first=True)
        with pytest.warns(UserWarning, match=r"'self_attn' \(.*attn_implementation='eager'"):
            survey(layer, torch.randn(SQUARE))

    def test_noise(self) -> None:
        model = Applied(lambda m, x: x + torch.randn_like(x))
        with pytest.warns(UserWarning, match=r"'Applied' \(randn_like|normal_"):
            survey(model, torch.randn(SQUARE))

    def test_nothing_where_there_is_nothing(self) -> None:
        layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
        model = nn.Sequential(layer, nn.Dropout(0.1), nn.Dropout1d(0.1), nn.AlphaDropout(0.1))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            survey(model, torch.randn(SQUARE))

    @pytest.mark.parametrize("training", [True, False])
    def test_batch_norm_that_is_called_directly(self, training: bool) -> None:
        model = Applied(
            lambda m, x: functional.batch_norm(
                x, torch.zeros(SAMPLES), torch.ones(SAMPLES), training=training
            )
        )
        found, _ = survey(model, torch.randn(SQUARE))
        assert found.calls_batch_norm == training

    def test_batch_norm_out_of_reach(self) -> None:
        model = Applied(
            lambda m, x: torch.batch_norm(x, None, None, None, None, True, 0.1, 1e-5, False)
        )
        with pytest.raises(RuntimeError, match=r"'Applied' is inside code .*'micro_batch'"):
            survey(model, torch.randn(SQUARE))
        survey(model, torch.randn(SQUARE), exact=False)


class TestCost:
    @pytest.mark.parametrize(
        ("probability", "options", "looks"),
        [
            (0.2, {}, 2),
            (0.0, {}, 1),
            (0.2, {"batch_norm": "micro_batch", "dropout": "native"}, 0),
        ],
        ids=["dropout", "no_dropout", "nothing_to_find"],
    )
    def test_in_forwards(self, probability: float, options: dict[str, str], looks: int) -> None:
        model = nn.Sequential(nn.Linear(4, 4))
        if probability:
            model.append(nn.Dropout(probability))
        seen: list[int] = []
        model.register_forward_hook(lambda module, inputs, outputs: seen.append(len(outputs)))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        loss_fn = nn.MSELoss()
        accumulator = StreamedAccumulator(model, optimizer, loss_fn, micro_batch_size=6, **options)
        for _ in range(2):
            accumulator.step(torch.randn(8, 4), torch.randn(8, 4))
        assert seen == [SAMPLES] * looks + [6, 2, 6, 2]


class TestNoTrace:
    def test_is_left(self) -> None:
        model = nn.Sequential(
            nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5, inplace=True), nn.Linear(4, 4)
        )
        inputs = torch.randn(SAMPLES, 4)
        state, copy_of_inputs = copy.deepcopy(model.state_dict()), inputs.clone()
        random_state = torch.get_rng_state()
        before = functional.dropout, functional.batch_norm
        survey(model, inputs)
        assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
        assert torch.equal(inputs, copy_of_inputs)
        assert torch.equal(torch.get_rng_state(), random_state)
        assert (functional.dropout, functional.batch_norm) == before

    def test_a_model_that_raises_is_not_looked_at(self) -> None:
        def fail(model: nn.Module, x: Tensor) -> Tensor:
            raise ZeroDivisionError

        found, layouts = survey(Applied(fail), torch.randn(SQUARE))
        assert layouts.recognised == {}
        assert not found.calls_batch_norm
