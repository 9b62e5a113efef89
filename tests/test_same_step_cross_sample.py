"""``cross_sample_loss=True``: the loss sees the outputs of the whole large batch, however it is split."""

from __future__ import annotations

import pytest
import tolerances
import torch
from reference.full_batch import (
    assert_gradients_match,
    buffers_of,
    full_batch,
    gradients_of,
)
from reference.running_statistics import assert_buffers_match
from same_step import SPLITS, UNEVEN, accumulator_for, check_same_step, every
from torch import Tensor, nn
from torch.nn import functional
from zoo import contrastive, language, norm_layers
from zoo.case import SAMPLES, Builder

from sbp_fast import StreamedAccumulator

WITHOUT_BATCH_NORM = [
    contrastive.info_nce,
    contrastive.siglip,
    contrastive.batch_hard_triplet,
    # A mean over tokens needs no pairs, but it is the same loss of all outputs.
    language.gpt_torch_loss,
]
WITH_BATCH_NORM = [
    contrastive.info_nce_batch_norm,
    contrastive.barlow_twins,
    contrastive.temperature_in_loss,
]
STEP = tolerances.STEP[torch.float64]


@every(*WITHOUT_BATCH_NORM)
@SPLITS
def test_in_double(build: Builder, micro_batch_size: int) -> None:
    check_same_step(build, torch.float64, micro_batch_size, cross_sample_loss=True)


@every(*WITH_BATCH_NORM)
@SPLITS
def test_with_batch_norm_in_double(build: Builder, micro_batch_size: int) -> None:
    check_same_step(
        build, torch.float64, micro_batch_size, cross_sample_loss=True, batch_norm="exact"
    )


@every(*WITHOUT_BATCH_NORM)
def test_in_single(build: Builder) -> None:
    check_same_step(build, torch.float32, UNEVEN, cross_sample_loss=True)


@every(*WITH_BATCH_NORM)
def test_with_batch_norm_in_single(build: Builder) -> None:
    check_same_step(build, torch.float32, UNEVEN, cross_sample_loss=True, batch_norm="exact")


def test_a_stream_of_uneven_micro_batches() -> None:
    case = contrastive.batch_hard_triplet().to(torch.float64)
    oracle = full_batch(case.model, case.loss_fn, case.inputs, case.targets)
    pieces = zip(case.inputs.split([1, 7, 4]), case.targets.split([1, 7, 4]), strict=True)
    accumulator_for(case, 3, cross_sample_loss=True).backward(iter(pieces))
    assert_gradients_match(gradients_of(case.model), oracle.gradients, STEP)


def test_dropout_is_the_same_in_both_passes() -> None:
    """The loss sees one mask; the gradient must have passed through the same, not through another."""
    linear = nn.Linear(6, 40).double()
    model = nn.Sequential(linear, nn.Dropout(0.5))
    inputs = torch.randn(SAMPLES, 6, dtype=torch.float64)
    seen: list[Tensor] = []

    def variance(outputs: Tensor, targets: Tensor) -> Tensor:
        seen.append(outputs.detach().clone())
        return outputs.var(0).sum()

    StreamedAccumulator(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        variance,
        micro_batch_size=UNEVEN,
        cross_sample_loss=True,
        dropout="native",
    ).backward(inputs, torch.zeros(SAMPLES))
    outputs = seen[-1]
    assert len(outputs) == SAMPLES
    mask = (outputs != 0) * 2.0
    seed = 2 * (outputs - outputs.mean(0)) / (SAMPLES - 1) * mask
    expected = {"0.weight": seed.T @ inputs, "0.bias": seed.sum(0)}
    assert_gradients_match(gradients_of(model), expected, STEP)


@pytest.mark.filterwarnings("ignore:.*batch norm layers:UserWarning")
def test_buffers_move_once_although_there_are_two_passes() -> None:
    buffers = []
    for cross_sample_loss in (False, True):
        case = norm_layers.plain().to(torch.float64)
        accumulator = accumulator_for(
            case, UNEVEN, cross_sample_loss=cross_sample_loss, batch_norm="micro_batch"
        )
        accumulator.backward(case.inputs, case.targets)
        buffers.append(buffers_of(case.model))
    assert_buffers_match(buffers[1], buffers[0], STEP)


def test_a_loss_of_all_outputs_is_called_once_with_the_whole_batch() -> None:
    model = nn.Linear(6, 3)
    lengths: list[int] = []

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        lengths.append(len(outputs))
        return functional.cross_entropy(outputs, targets)

    StreamedAccumulator(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        loss_fn,
        micro_batch_size=UNEVEN,
        cross_sample_loss=True,
    ).step(torch.randn(SAMPLES, 6), torch.randint(3, (SAMPLES,)))
    assert lengths == [SAMPLES]
