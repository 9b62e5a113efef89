"""``dropout="per_sample"``: masks depend on the sample, so any split makes the same step.

The reference is the whole batch in one piece under the same seed. That its masks are dropout's is
shown on the outputs themselves.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import tolerances
import torch
from reference.full_batch import (
    Gradients,
    assert_gradients_match,
    buffers_of,
    total_relative_error,
)
from reference.running_statistics import assert_buffers_match
from same_step import UNEVEN, accumulator_for, all_gradients, every
from torch import Tensor, nn
from torch.nn import functional
from zoo import contrastive, dropout_layers, from_transformers, language
from zoo.case import SAMPLES, Builder, Case, builders_in

from sbp_fast import StreamedAccumulator

BUILDERS = [
    *builders_in(dropout_layers),
    language.gpt_dropout,
    language.gpt_dropout_checkpointed,
    from_transformers.vit_dropout,
    from_transformers.swin_dropout,
]
STEP = tolerances.STEP[torch.float64]


@functools.cache
def whole(build: Builder, batch_norm: str, cross_sample_loss: bool) -> tuple[Gradients, Case]:
    return run(build, SAMPLES, batch_norm=batch_norm, cross_sample_loss=cross_sample_loss)


def run(
    build: Builder, micro_batch_size: int, seed: int = 1, **options: Any
) -> tuple[Gradients, Case]:
    case = build().to(torch.float64)
    accumulator = accumulator_for(case, micro_batch_size, dropout="per_sample", **options)
    torch.manual_seed(seed)
    accumulator.backward(case.inputs, case.targets)
    return all_gradients(case), case


@every(*BUILDERS)
@pytest.mark.parametrize("micro_batch_size", [1, UNEVEN])
def test_any_split_drops_the_same(build: Builder, micro_batch_size: int) -> None:
    expected, _ = whole(build, "exact", False)
    actual, _ = run(build, micro_batch_size, batch_norm="exact")
    assert_gradients_match(actual, expected, STEP)


@every(*BUILDERS)
def test_another_seed_drops_something_else(build: Builder) -> None:
    gradients, _ = whole(build, "exact", False)
    others, _ = run(build, SAMPLES, seed=2, batch_norm="exact")
    assert total_relative_error(others, gradients) > tolerances.CLEARLY_WRONG


@pytest.mark.parametrize(
    ("build", "cross_sample_loss"),
    [(from_transformers.efficientnet_dropout, False), (contrastive.info_nce_dropout, True)],
    ids=["efficientnet", "info_nce"],
)
@pytest.mark.parametrize("micro_batch_size", [1, UNEVEN])
def test_with_batch_norm_and_pairs(
    build: Builder, cross_sample_loss: bool, micro_batch_size: int
) -> None:
    expected, whole_case = whole(build, "exact", cross_sample_loss)
    actual, case = run(
        build, micro_batch_size, batch_norm="exact", cross_sample_loss=cross_sample_loss
    )
    assert_gradients_match(actual, expected, STEP)
    assert_buffers_match(buffers_of(case.model), buffers_of(whole_case.model), STEP)


class TwoMasks(nn.Module):
    """One linear layer, dropped twice, side by side."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 300)
        self.dropouts = nn.ModuleList([nn.Dropout(probability), nn.Dropout(probability)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        return torch.cat([dropout(x) for dropout in self.dropouts], 1)


class Shown:
    """A model whose outputs show its masks, and a loss that keeps the outputs which it is shown."""

    def __init__(self, probability: float = 0.3) -> None:
        torch.manual_seed(0)
        self.model = TwoMasks(probability).double()
        self.inputs = torch.randn(SAMPLES, 6, dtype=torch.float64)
        self.targets = torch.randn(SAMPLES, 600, dtype=torch.float64)
        self.before = self.model.linear(self.inputs).detach().repeat(1, 2)
        self.shown: list[Tensor] = []

    def loss_fn(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self.shown.append(outputs.detach().clone())
        return functional.mse_loss(outputs, targets)

    def accumulator(self, micro_batch_size: int) -> StreamedAccumulator:
        return StreamedAccumulator(
            self.model,
            torch.optim.SGD(self.model.parameters(), lr=0.1),
            self.loss_fn,
            micro_batch_size=micro_batch_size,
            normalization="mean",
            dropout="per_sample",
        )

    def outputs(self, micro_batch_size: int, stream: list[int] | None = None) -> Tensor:
        accumulator = self.accumulator(micro_batch_size)
        self.shown.clear()
        torch.manual_seed(1)
        if stream is None:
            accumulator.backward(self.inputs, self.targets)
        else:
            pieces = zip(self.inputs.split(stream), self.targets.split(stream), strict=True)
            accumulator.backward(iter(pieces))
        # The last SAMPLES: a probe of the loss may have come first.
        return torch.cat(self.shown)[-SAMPLES:]


def largest_agreement(masks: Tensor) -> float:
    """How far any two rows are from agreeing in half of their columns, in standard deviations."""
    agreement = (masks[:, None] == masks[None]).double().mean(2).fill_diagonal_(0.5)
    return float((agreement - 0.5).abs().max()) / (0.25 / masks.shape[1]) ** 0.5


class TestMasks:
    def test_what_is_kept_is_scaled(self) -> None:
        case = Shown(0.3)
        outputs = case.outputs(UNEVEN)
        kept = outputs != 0
        torch.testing.assert_close(outputs[kept], case.before[kept] / 0.7, rtol=STEP, atol=0)
        # Five standard deviations: of all draws, and of each sample's.
        assert abs(float(kept.double().mean()) - 0.7) < 5 * (0.21 / kept.numel()) ** 0.5
        assert float((kept.double().mean(1) - 0.7).abs().max()) < 5 * (0.21 / 600) ** 0.5

    def test_samples_and_calls_have_masks_of_their_own(self) -> None:
        kept = Shown(0.5).outputs(UNEVEN) != 0
        assert largest_agreement(torch.cat(kept.chunk(2, 1))) < 5

    def test_any_split_and_any_stream_shows_the_same(self) -> None:
        case = Shown()
        outputs = case.outputs(SAMPLES)
        for micro_batch_size in (1, 5, 7):
            torch.testing.assert_close(case.outputs(micro_batch_size), outputs, rtol=STEP, atol=0)
        streamed = case.outputs(3, stream=[4, 1, 7])
        torch.testing.assert_close(streamed, outputs, rtol=STEP, atol=0)

    def test_the_gradient_has_the_masks_of_the_outputs(self) -> None:
        case = Shown(0.3)
        outputs = case.outputs(UNEVEN)
        seed = 2 * (outputs - case.targets) / outputs.numel() * (outputs != 0) / 0.7
        seed = sum(seed.chunk(2, 1))
        expected = {"linear.weight": seed.T @ case.inputs, "linear.bias": seed.sum(0)}
        actual = {name: p.grad for name, p in case.model.named_parameters()}
        assert_gradients_match(actual, expected, STEP)

    def test_every_step_draws_anew(self) -> None:
        case = Shown(0.5)
        accumulator = case.accumulator(SAMPLES)
        for _ in range(2):
            accumulator.backward(case.inputs, case.targets)
        first, second = (outputs[:1] != 0 for outputs in case.shown[-2:])
        assert largest_agreement(torch.cat([first, second])) < 5

    def test_the_layer_is_its_own_again_afterwards(self) -> None:
        case = Shown(0.5)
        case.outputs(UNEVEN)
        torch.manual_seed(3)
        actual = case.model(case.inputs)
        torch.manual_seed(3)
        plain = case.model.linear(case.inputs)
        expected = torch.cat([functional.dropout(plain, 0.5), functional.dropout(plain, 0.5)], 1)
        assert torch.equal(actual, expected)
        assert torch.equal(case.model.eval()(case.inputs), plain.repeat(1, 2))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 12)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, 2)
        return functional.scaled_dot_product_attention(q, k, v, dropout_p=0.1).mean(1)


def test_dropout_within_attention_is_named_in_a_warning() -> None:
    model = nn.Sequential(Attention(), nn.Linear(4, 3))
    accumulator = StreamedAccumulator(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        nn.CrossEntropyLoss(),
        micro_batch_size=UNEVEN,
        dropout="per_sample",
    )
    with pytest.warns(UserWarning, match="draws by itself.*'0'"):
        accumulator.backward(torch.randn(SAMPLES, 5, 4), torch.randint(3, (SAMPLES,)))
