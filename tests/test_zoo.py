"""The zoo itself: it is what it says, and plain accumulation is clearly wrong where it should be.

So a comparison with the whole batch can fail, and what passes it has been shown something.
"""

from __future__ import annotations

import pytest
import tolerances
import torch
from reference.full_batch import (
    buffers_of,
    gradients_of,
    total_relative_error,
)
from reference.running_statistics import buffer_errors
from same_step import (
    SPLITS,
    UNEVEN,
    accumulator_for,
    all_gradients,
    check_same_step,
    every,
    expected_gradients,
    oracle_of,
    whole_loss,
)
from torch import nn
from zoo import (
    contrastive,
    convolutional,
    dropout_layers,
    from_transformers,
    language,
    norm_graphs,
    norm_layers,
)
from zoo.case import SAMPLES, Builder, Case, builders_in

pytestmark = pytest.mark.filterwarnings("ignore:.*batch norm layers:UserWarning")

DOES_NOT_MIX_SAMPLES = [
    from_transformers.vit,
    from_transformers.swin,
    language.gpt,
    language.gpt_torch_loss,
]
DROPS = [
    from_transformers.vit_dropout,
    from_transformers.swin_dropout,
    language.gpt_dropout,
    language.gpt_dropout_checkpointed,
    *builders_in(dropout_layers),
]
BATCH_NORM = [
    from_transformers.resnet50,
    from_transformers.efficientnet,
    *builders_in(convolutional),
    *builders_in(norm_layers),
    *builders_in(norm_graphs),
]
CROSS_SAMPLE = [build for build in builders_in(contrastive) if build.__name__ != "info_nce_dropout"]


def part_of(case: Case, start: int, stop: int) -> Case:
    inputs = case.inputs
    inputs = (
        {name: leaf[start:stop] for name, leaf in inputs.items()}
        if isinstance(inputs, dict)
        else inputs[start:stop]
    )
    return Case(case.model, case.loss_fn, inputs, case.targets[start:stop])


def error_of(case: Case, build: Builder) -> float:
    return total_relative_error(all_gradients(case), expected_gradients(oracle_of(build)))


@every(*DOES_NOT_MIX_SAMPLES)
@SPLITS
def test_without_batch_norm_and_dropout_any_split_is_the_same(
    build: Builder, micro_batch_size: int
) -> None:
    check_same_step(build, torch.float64, micro_batch_size)


@every(*BATCH_NORM)
def test_batch_norm_of_micro_batches_is_clearly_wrong(build: Builder) -> None:
    case = build().to(torch.float64)
    accumulator_for(case, UNEVEN, batch_norm="micro_batch").backward(case.inputs, case.targets)
    assert error_of(case, build) > tolerances.CLEARLY_WRONG
    errors = buffer_errors(buffers_of(case.model), oracle_of(build).buffers)
    assert not errors or max(errors.values()) > tolerances.CLEARLY_WRONG


# Where a model recomputes, torch itself updates running statistics again.
@every(*(build for build in BATCH_NORM if build is not norm_graphs.checkpointed))
def test_batch_norm_of_the_whole_batch_in_one_piece(build: Builder) -> None:
    check_same_step(build, torch.float64, SAMPLES, batch_norm="micro_batch")


@every(*CROSS_SAMPLE)
def test_pairs_within_micro_batches_alone_are_clearly_wrong(build: Builder) -> None:
    case = build().to(torch.float64)
    for start in range(0, SAMPLES, UNEVEN):
        part = part_of(case, start, min(start + UNEVEN, SAMPLES))
        (whole_loss(part) * (len(part.targets) / SAMPLES)).backward()
    assert error_of(case, build) > tolerances.CLEARLY_WRONG


@every(*DROPS)
def test_native_dropout_depends_on_the_split(build: Builder) -> None:
    gradients = []
    for micro_batch_size in (UNEVEN, SAMPLES):
        case = build().to(torch.float64)
        torch.manual_seed(1)
        accumulator_for(
            case, micro_batch_size, dropout="native", batch_norm="micro_batch"
        ).backward(case.inputs, case.targets)
        gradients.append(gradients_of(case.model))
    assert total_relative_error(*gradients) > tolerances.CLEARLY_WRONG


@pytest.mark.parametrize(
    ("build", "layers"),
    [(from_transformers.resnet50, 53), (from_transformers.efficientnet, 49)],
)
def test_deep_nets_are_as_deep_as_their_names_say(build: Builder, layers: int) -> None:
    assert sum(isinstance(m, nn.BatchNorm2d) for m in build().model.modules()) == layers


@every(from_transformers.vit_dropout, norm_graphs.momentum_encoder, contrastive.info_nce)
def test_builders_are_seeded_and_leave_the_generator_alone(build: Builder) -> None:
    state = torch.get_rng_state()
    first = build().model.state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    second = build().model.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
