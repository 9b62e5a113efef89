"""Memory that runs out at a chosen allocation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class Failing(TorchDispatchMode):
    """Raises torch.OutOfMemoryError in place of some allocations, by number.

    Attributes:
        allocations: how many have been asked for.
        failed: how many were refused.
    """

    def __init__(self, *numbers: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.numbers = set(numbers)
        self.allocations = 0
        self.failed = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        outputs = func(*args, **kwargs)
        if storages(outputs) <= storages((args, kwargs)):
            return outputs
        number, self.allocations = self.allocations, self.allocations + 1
        if number in self.numbers:
            self.failed += 1
            del outputs, args, kwargs
            raise torch.OutOfMemoryError(f"out of memory: allocation {number} by {func}")
        return outputs


def storages(tree: Any) -> set[int]:
    leaves = pytree.tree_leaves(tree)
    return {leaf.untyped_storage()._cdata for leaf in leaves if isinstance(leaf, Tensor)}
