"""Whole architectures under ``batch_norm="exact"``: any split makes the step of the whole batch."""

from __future__ import annotations

import pytest
import torch
from same_step import SPLITS, UNEVEN, check_same_step, every
from zoo import convolutional, from_transformers, language
from zoo.case import Builder, builders_in

# Nobody is warned that the step depends on the split.
pytestmark = pytest.mark.filterwarnings("error:.*batch norm:UserWarning")

ARCHITECTURES = [
    from_transformers.efficientnet,
    *builders_in(convolutional),
    # Without batch norm, exactness costs nothing and changes nothing.
    from_transformers.vit,
    from_transformers.swin,
    language.gpt,
    language.gpt_torch_loss,
]


@every(from_transformers.resnet50, *ARCHITECTURES)
@SPLITS
def test_in_double(build: Builder, micro_batch_size: int) -> None:
    check_same_step(build, torch.float64, micro_batch_size, batch_norm="exact")


@every(from_transformers.resnet50_smooth, *ARCHITECTURES)
def test_in_single(build: Builder) -> None:
    check_same_step(build, torch.float32, UNEVEN, batch_norm="exact")
