"""``batch_norm="exact"`` for every form of the layer, and every place that it can have in a graph."""

from __future__ import annotations

import pytest
import torch
from same_step import SPLITS, UNEVEN, check_same_step, every
from zoo import norm_graphs, norm_layers
from zoo.case import Builder, builders_in

# Nobody is warned that the step depends on the split.
pytestmark = pytest.mark.filterwarnings("error:.*batch norm:UserWarning")

BUILDERS = [*builders_in(norm_layers), *builders_in(norm_graphs)]


@every(*BUILDERS)
@SPLITS
def test_in_double(build: Builder, micro_batch_size: int) -> None:
    check_same_step(build, torch.float64, micro_batch_size, batch_norm="exact")


# Where a gradient is all rounding errors, float32 has nothing to compare.
@every(*(build for build in BUILDERS if build is not norm_layers.bias_before_norm))
def test_in_single(build: Builder) -> None:
    check_same_step(build, torch.float32, UNEVEN, batch_norm="exact")
