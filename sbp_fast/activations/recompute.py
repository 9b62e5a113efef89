"""Blocks that keep only their inputs, and are computed again when their backward pass comes.

The model stays as it is. While a step runs, the ``forward`` of each block (:mod:`.blocks`) goes through
``torch.utils.checkpoint`` without reentrance. Hooks on the block itself are outside of that: they run
once, as always.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import CheckpointError, checkpoint

from ..memory import LiveBytes
from ..memory.host_store import HostStore
from .arguments import as_now
from .block_buffers import BlockBuffers
from .blocks import Blocks, find_blocks

Function = Callable[..., Any]


class Recompute:
    """``activations="recompute"``.

    Args:
        model: whose blocks are computed again.
        blocks: these; None: those that it has when a step begins.

    Attributes:
        only: of the blocks, those with these keys (:attr:`.blocks.Blocks.keys`); None: all.
        writes: by key, whether a block was seen to change its inputs in place; no entry before its first
            call, for which they are copied.
    """

    def __init__(self, model: nn.Module, blocks: Blocks | None = None) -> None:
        self._model = model
        self._blocks = blocks
        self.only: Set[nn.Module] | None = None
        self.writes: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()

    def __str__(self) -> str:
        return "recompute"

    @contextmanager
    def during(
        self,
        device: torch.device,
        counter: LiveBytes | None,
        *,
        meets: Callable[[Sequence[nn.Module]], bool] | None,
    ) -> Iterator[HostStore | None]:
        """While inside, blocks are computed again in backward.

        Not those in which micro-batches wait for one another: what they need waits in host memory, and
        they would be computed again from each meeting point to the next.

        Raises:
            torch.utils.checkpoint.CheckpointError: a block computed something else the second time.
        """
        blocks = self._blocks or find_blocks(self._model)
        if blocks.compiled is not None and not (blocks.whole or blocks.cut):
            warnings.warn(
                f"activations='recompute' does nothing inside of compiled code ({blocks.compiled}); "
                "compile the blocks of the model instead (block.compile() for each), or pass "
                "activations='offload'",
                stacklevel=5,
            )

        def twice(block: nn.Module, native: Function, key: nn.Module) -> Function | None:
            is_meant = self.only is None or key in self.only
            if not is_meant or (meets is not None and meets([block])):
                return None
            return self._twice(block, native, key)

        with forwards_replaced(blocks, twice):
            try:
                yield None
            except CheckpointError as error:
                raise CheckpointError(
                    f"{error}\nactivations='recompute' computes each block of the model twice, and the "
                    "second time was not like the first: because of random numbers that are not torch's, "
                    "say, or of what forward keeps in attributes. Where that cannot be changed, pass "
                    "activations='offload' or 'keep'"
                ) from error

    def _twice(self, block: nn.Module, native: Function, key: nn.Module) -> Function:
        """The block's forward, kept as its inputs alone.

        Args:
            key: a module of the model's that stands for the block from step to step.
        """
        with_buffers = [module for module in block.modules() if module._buffers]

        @wraps(native, updated=())
        def forward(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return native(*args, **kwargs)
            leaves, structure = pytree.tree_flatten((args, kwargs))
            buffers = BlockBuffers(with_buffers) if with_buffers else None
            # The first time with the caller's own lists and dicts, which it may want to see changed.
            given = [(args, kwargs)]

            def run(*leaves: Any) -> Any:
                if given:
                    first_args, first_kwargs = given.pop()
                    return native(*first_args, **first_kwargs)
                again = [as_now(leaf) for leaf in leaves]
                again_args, again_kwargs = pytree.tree_unflatten(again, structure)
                with ExitStack() as stack:
                    if buffers is not None:
                        stack.enter_context(buffers.for_a_while())
                    return native(*again_args, **again_kwargs)

            # A block that changes its inputs is computed again from copies of them. Whether it does is
            # seen when it is called for the first time.
            versions = [_version(leaf) for leaf in leaves]
            kept = leaves if self.writes.get(key) is False else _copies(leaves)
            outputs = checkpoint(run, *map(as_now, kept), use_reentrant=False)
            if key not in self.writes:
                self.writes[key] = versions != [_version(leaf) for leaf in leaves]
            return outputs

        return forward


@contextmanager
def forwards_replaced(
    blocks: Blocks, replacement: Callable[[nn.Module, Function, nn.Module], Function | None]
) -> Iterator[None]:
    """While inside, blocks have other forwards.

    Args:
        replacement: ``replacement(block, forward, key)`` gives the other one, or None for none.
    """
    with ExitStack() as installed:
        for block in blocks.whole:
            attribute = "forward"
            if getattr(block, "_compiled_call_impl", None) is not None:
                attribute = "_compiled_call_impl"
            forward = replacement(block, getattr(block, attribute), block)
            if forward is not None:
                installed.enter_context(_replaced(block, attribute, forward))
        for sequence, pieces in blocks.cut:
            others = [replacement(piece, piece.forward, piece[0]) for piece in pieces]
            if any(others):
                steps = [
                    piece.forward if other is None else other
                    for piece, other in zip(pieces, others, strict=True)
                ]
                installed.enter_context(_replaced(sequence, "forward", partial(_in_turn, steps)))
        yield


@contextmanager
def _replaced(module: nn.Module, attribute: str, function: Function) -> Iterator[None]:
    """While inside, an instance has a method of its own."""
    own = vars(module)
    before = own.get(attribute)
    own[attribute] = function
    try:
        yield
    finally:
        if before is None:
            del own[attribute]
        else:
            own[attribute] = before


def _in_turn(steps: list[Function], input: Any) -> Any:
    for step in steps:
        input = step(input)
    return input


def _copies(leaves: list[Any]) -> list[Any]:
    return [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]


def _version(leaf: Any) -> int:
    return leaf._version if isinstance(leaf, Tensor) and not leaf.is_inference() else 0
