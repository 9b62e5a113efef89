"""The peak of a step is the accumulators and about one layer's gradient, not two full sets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from sbp_fast import StreamedAccumulator

MIB = 1 << 20


class LargeStorages(TorchDispatchMode):
    """Follows every storage of at least ``floor`` bytes that is made inside, until it is freed.

    With two samples at a time nothing but gradients is that large. Written for this test alone: what
    it measures must not be counted by the library itself.
    """

    def __init__(self, floor: int) -> None:
        super().__init__()
        self.floor = floor
        self.peak_bytes = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        known = {
            leaf.untyped_storage()._cdata
            for leaf in pytree.tree_leaves((args, kwargs))
            if isinstance(leaf, Tensor)
        }
        outputs = function(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(outputs):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in known:
                storage = leaf.untyped_storage()
                if storage.nbytes() >= self.floor:
                    self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak_bytes = max(self.peak_bytes, self.live_bytes())
        return outputs

    def live_bytes(self) -> int:
        self._alive = {key: pair for key, pair in self._alive.items() if not pair[0].expired()}
        return sum(nbytes for _, nbytes in self._alive.values())


def deep(width: int, layers: int, dtype: torch.dtype) -> nn.Module:
    return nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers))).to(dtype)


def measure(
    model: nn.Module, width: int, micro_batch_size: int, method: str = "step"
) -> LargeStorages:
    dtype = next(model.parameters()).dtype
    accumulator = StreamedAccumulator(
        model,
        torch.optim.SGD(model.parameters(), lr=0.01, foreach=False),
        nn.MSELoss(),
        micro_batch_size=micro_batch_size,
    )
    inputs = torch.randn(4, width, dtype=dtype)
    largest = max(parameter.nbytes for parameter in model.parameters())
    with LargeStorages(largest) as storages:
        getattr(accumulator, method)(inputs, inputs)
    return storages


class TestPeak:
    @pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
    def test_float32(self, micro_batch_size: int) -> None:
        model = deep(512, 8, torch.float32)  # 1 MiB a layer, as much as one call waits for
        storages = measure(model, 512, micro_batch_size)
        # The accumulators, the gradient that is being added, and the one that autograd is making.
        assert 8 * MIB <= storages.peak_bytes <= 10 * MIB
        assert storages.live_bytes() == 0

    def test_backward_keeps_one_set(self) -> None:
        model = deep(512, 8, torch.float32)
        storages = measure(model, 512, 1, "backward")
        assert storages.peak_bytes <= 10 * MIB
        assert storages.live_bytes() == 8 * MIB

    def test_bfloat16(self) -> None:
        """Sums in float32 become gradients in bfloat16 a group at a time."""
        layers = 12
        model = deep(1024, layers, torch.bfloat16)  # 2 MiB a layer, and 4 MiB for its accumulator
        storages = measure(model, 1024, 2, "backward")
        group = 32 * MIB
        assert storages.peak_bytes <= layers * 4 * MIB + group // 2 + 4 * MIB
        assert storages.peak_bytes < layers * (4 + 2) * MIB
        assert storages.live_bytes() == layers * 2 * MIB

    def test_plain_accumulation_of_copies_would_be_seen(self) -> None:
        """That the measure can fail: a second set of gradients counts."""
        model, kept = deep(512, 8, torch.float32), []
        for parameter in model.parameters():
            parameter.register_hook(kept.append)
        storages = measure(model, 512, 1)
        assert storages.peak_bytes >= 16 * MIB
