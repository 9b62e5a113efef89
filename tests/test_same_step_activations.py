"""``activations="recompute"`` and ``"offload"`` leave the step as it is.

On whole architectures, with both kinds of batch norm, with dropout, and with losses over all samples.
"""

from __future__ import annotations

from typing import Any

import pytest
import tolerances
import torch
from reference.full_batch import Gradients, assert_gradients_match, buffers_of, total_relative_error
from reference.running_statistics import assert_buffers_match
from same_step import UNEVEN, accumulator_for, all_gradients, check_same_step, every
from zoo import (
    contrastive,
    convolutional,
    dropout_layers,
    from_transformers,
    language,
    norm_graphs,
    norm_layers,
)
from zoo.case import Builder, Case

pytestmark = pytest.mark.filterwarnings("ignore:.*batch norm layers:UserWarning")

WAYS = pytest.mark.parametrize("activations", ["recompute", "offload"])
STEP = tolerances.STEP[torch.float64]

BATCH_NORM = [
    from_transformers.resnet50,
    convolutional.unet,
    convolutional.residual_channels_last,
    convolutional.dense_net,
    norm_graphs.pre_activation,
    norm_graphs.cumulative_used_twice,
    # In a row of layers, and by a function that no layer gives away.
    norm_layers.vectors,
    norm_layers.functional_call,
]


@pytest.fixture(autouse=True)
def _small_tensors_travel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The zoo's are all small."""
    monkeypatch.setattr("sbp_fast.activations.offload._SMALLEST_BYTES", 64)


def run(build: Builder, activations: str, seed: int = 1, **options: Any) -> tuple[Gradients, Case]:
    case = build().to(torch.float64)
    torch.manual_seed(seed)
    accumulator_for(case, UNEVEN, activations=activations, **options).backward(
        case.inputs, case.targets
    )
    return all_gradients(case), case


def check_as_kept(build: Builder, activations: str, **options: Any) -> None:
    """Gradients and buffers are those of ``activations="keep"``."""
    expected, kept = run(build, "keep", **options)
    actual, case = run(build, activations, **options)
    assert_gradients_match(actual, expected, STEP)
    assert_buffers_match(buffers_of(case.model), buffers_of(kept.model), STEP)


@WAYS
@every(
    *BATCH_NORM,
    norm_graphs.checkpointed,
    from_transformers.vit,
    from_transformers.swin,
    language.gpt,
)
def test_against_the_whole_batch(build: Builder, activations: str) -> None:
    check_same_step(build, torch.float64, UNEVEN, activations=activations)


@WAYS
@every(from_transformers.vit, language.gpt_torch_loss)
def test_in_single(build: Builder, activations: str) -> None:
    check_same_step(build, torch.float32, UNEVEN, activations=activations)


@WAYS
@every(*BATCH_NORM, norm_graphs.used_twice)
def test_batch_norm_of_micro_batches(build: Builder, activations: str) -> None:
    """torch's own layers count what they see: what is computed again must not count again. (In a
    checkpoint of the model's own it does, when activations are kept.)"""
    check_as_kept(build, activations, batch_norm="micro_batch")


@WAYS
@every(
    dropout_layers.elements,
    dropout_layers.elements_in_place,
    dropout_layers.one_layer_twice,
    dropout_layers.stochastic_depth,
    dropout_layers.folded_samples,
    language.gpt_dropout,
    language.gpt_dropout_checkpointed,
    from_transformers.swin_dropout,
)
def test_dropout_per_sample(build: Builder, activations: str) -> None:
    check_as_kept(build, activations)


@WAYS
@every(dropout_layers.elements, language.gpt_dropout)
def test_dropout_of_the_models_own(build: Builder, activations: str) -> None:
    check_as_kept(build, activations, dropout="native")


def test_another_seed_would_be_seen() -> None:
    expected, _ = run(language.gpt_dropout, "keep")
    others, _ = run(language.gpt_dropout, "recompute", seed=2)
    assert total_relative_error(others, expected) > tolerances.CLEARLY_WRONG


@WAYS
@every(contrastive.info_nce, contrastive.info_nce_batch_norm, contrastive.temperature_in_loss)
def test_losses_over_all_samples(build: Builder, activations: str) -> None:
    """By a second pass without batch norm, in one with it."""
    check_same_step(build, torch.float64, UNEVEN, cross_sample_loss=True, activations=activations)


@WAYS
def test_autocast(activations: str) -> None:
    """Casts are the same both times."""
    expected, _ = run(language.gpt, "keep", autocast=torch.bfloat16)
    actual, _ = run(language.gpt, activations, autocast=torch.bfloat16)
    assert_gradients_match(actual, expected, tolerances.RELATIVE[torch.bfloat16])


def frozen_second() -> Case:
    """Gradients go through a block that has none of its own."""
    case = language.gpt()
    case.model.blocks[1].requires_grad_(False)
    return case


def frozen_first() -> Case:
    """Nothing before or in the first block needs a gradient."""
    case = language.gpt()
    case.model.requires_grad_(False)
    case.model.blocks[1].requires_grad_(True)
    return case


@WAYS
@every(frozen_second, frozen_first)
def test_frozen_blocks(build: Builder, activations: str) -> None:
    check_as_kept(build, activations)
