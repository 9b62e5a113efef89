"""What each block of a model keeps for its backward pass, and what it takes to compute it again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ..activations.blocks import Blocks
from ..activations.policy import Meets
from ..activations.recompute import forwards_replaced
from ..memory import LiveBytes
from ..memory.live_bytes import is_pure_view

# Floating-point operations in the time of a byte from memory, in round numbers: some 1e11 and 1e10 a
# second on a few CPU cores, 2e14 and 2e12 on a GPU with 16-bit matrices.
_OPERATIONS_PER_BYTE = {"cpu": 10, "cuda": 100}
_LEAST_SHARE = 1e-9


@dataclass(frozen=True)
class BlockCost:
    """Of one block, in the forward pass.

    Attributes:
        saved_bytes: what is alive for each sample when it has been computed, beside its outputs.
        share: of the time of the whole forward pass.
    """

    saved_bytes: float
    share: float


def worth_it(costs: Mapping[nn.Module, BlockCost]) -> list[nn.Module]:
    """The blocks that keep something, those first that keep most for their time.

    The block that is computed last comes last: it is the first that is wanted again, when nothing else
    has been freed. Among equals, the earlier one is wanted later.

    Args:
        costs: by block, in the order in which they are computed.
    """
    keys = list(costs)

    def rank(key: nn.Module) -> tuple[bool, float]:
        return key is keys[-1], -costs[key].saved_bytes / max(costs[key].share, _LEAST_SHARE)

    return sorted((key for key in keys if costs[key].saved_bytes > 0), key=rank)


@dataclass
class Weighing:
    """A way to treat activations that keeps them, and takes note of what blocks cost.

    Args:
        blocks: of the model.
        counter: counts what is live.
        is_forward: whether a forward pass is under way, and not what is computed in a backward pass.
        device_type: that is planned for.
    """

    blocks: Blocks
    counter: LiveBytes
    is_forward: Callable[[], bool]
    device_type: str
    # In bytes from memory, that take as long.
    work: float = 0.0
    _saved: dict[nn.Module, int] = field(default_factory=dict)
    _work: dict[nn.Module, float] = field(default_factory=dict)

    def costs(self, samples: int) -> dict[nn.Module, BlockCost]:
        """After so many samples: of each block by its key, in the order in which they were called."""
        return {
            key: BlockCost(saved / samples, self._work[key] / max(self.work, 1.0))
            for key, saved in self._saved.items()
        }

    @contextmanager
    def during(
        self, device: torch.device, counter: LiveBytes | None, *, meets: Meets | None
    ) -> Iterator[None]:
        """While inside, blocks are looked at; not those in which micro-batches meet."""

        def weighed(
            block: nn.Module, native: Callable[..., Any], key: nn.Module
        ) -> Callable[..., Any] | None:
            if meets is not None and meets([block]):
                return None

            @wraps(native, updated=())
            def forward(*args: Any, **kwargs: Any) -> Any:
                if not self.is_forward() or not torch.is_grad_enabled():
                    return native(*args, **kwargs)
                given = _tensors((args, kwargs))
                live, work = self.counter.live_bytes, self.work
                outputs = native(*args, **kwargs)
                # What is handed on is kept in any case.
                live += self.counter.bytes_in([*given, *_tensors(outputs)])
                live -= self.counter.bytes_in(given)
                self._saved[key] = self._saved.get(key, 0) + self.counter.live_bytes - live
                self._work[key] = self._work.get(key, 0.0) + self.work - work
                return outputs

            return forward

        with forwards_replaced(self.blocks, weighed), _Work(self):
            yield


class _Work(TorchDispatchMode):
    """Adds up the work of forward passes."""

    def __init__(self, weighing: Weighing) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # Here, since it comes with Triton.
        from torch.utils.flop_counter import flop_registry

        self._counts = flop_registry
        self._weighing = weighing
        self._operations_per_byte = _OPERATIONS_PER_BYTE[weighing.device_type]

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        outputs = func(*args, **kwargs)
        if self._weighing.is_forward() and not is_pure_view(func):
            self._weighing.work += sum(t.nbytes for t in _tensors((args, kwargs, outputs)))
            count = self._counts.get(func.overloadpacket)
            if count is not None:
                operations = count(*args, **kwargs, out_val=outputs)
                self._weighing.work += operations / self._operations_per_byte
        return outputs


def _tensors(tree: Any) -> list[Tensor]:
    return [
        leaf
        for leaf in pytree.tree_leaves(tree)
        if isinstance(leaf, Tensor) and leaf.layout is torch.strided
    ]
