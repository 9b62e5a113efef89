"""The parts of a model that are worth computing again one at a time: its repeated blocks.

A model that keeps only the inputs of its blocks needs room for those and for one block's activations.
Many small blocks have many inputs, few large ones have many activations: the best are in between.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import cast

import torch
from torch import nn

from ..parameters import modules_below

# Code of their own instead of a forward that could be exchanged; copies of what is exchanged.
_OPAQUE = (torch.jit.ScriptModule, nn.DataParallel)


@dataclass(frozen=True)
class Blocks:
    """What is to be computed again.

    Attributes:
        whole: modules that are a block each.
        cut: plain ``nn.Sequential`` s and the pieces that their children fall into, in order.
        compiled: the name of a compiled module that may have hidden others; None where there is none.
    """

    whole: Sequence[nn.Module]
    cut: Sequence[tuple[nn.Sequential, Sequence[nn.Sequential]]]
    compiled: str | None

    @property
    def keys(self) -> list[nn.Module]:
        """A module of the model's for each block: itself, or the first layer of a piece."""
        first_layers = (piece[0] for _, pieces in self.cut for piece in pieces)
        return list(dict.fromkeys([*self.whole, *first_layers]))

    def in_copy(self, copies: Mapping[nn.Module, nn.Module]) -> Blocks:
        """The same blocks of a copy of the model, given the copy of each module."""
        return Blocks(
            [copies[block] for block in self.whole],
            [
                (
                    cast(nn.Sequential, copies[sequence]),
                    [nn.Sequential(*map(copies.__getitem__, piece)) for piece in pieces],
                )
                for sequence, pieces in self.cut
            ],
            self.compiled,
        )


def find_blocks(model: nn.Module) -> Blocks:
    """The repeated blocks: children of one class, side by side in the model or in its lists.

    Where blocks consist of repeated blocks themselves (stages of layers), the level is taken at which
    the number of blocks and the layers of the largest, together with those that are in no block, are
    fewest: as if every layer kept as much as a block's input. By the same measure, plain rows of layers
    fall into about as many pieces as each then has layers (Chen et al. 2016, "Training Deep Nets with
    Sublinear Memory Cost"). Where nothing repeats, the longest row is all there is, or else the model
    is one block.
    """
    compiled = _compiled_name(model)
    total = _layers(model)
    level = best = _repeated(model)
    while level:
        within = [_repeated(block) for block in level]
        if not any(within):
            break
        # Modules may be shared: each once.
        finer = list(
            dict.fromkeys(
                inner
                for block, blocks in zip(level, within, strict=True)
                for inner in (blocks or [block])
            )
        )
        if _cost(finer, total) < _cost(best, total):
            best = finer
        level = finer
    if not best:
        rows = [module for module in _within_reach(model) if _is_row(module)]
        best = [max(rows, key=_layers)] if rows else [] if compiled else [model]
    return _with_rows_cut(best, total, compiled)


def _with_rows_cut(blocks: list[nn.Module], total: int, compiled: str | None) -> Blocks:
    """Cuts the largest, as long as that leaves less to be kept."""
    whole = list(blocks)
    cut: dict[nn.Sequential, Sequence[nn.Sequential]] = {}
    while whole:
        largest = max(whole, key=_layers)
        if not isinstance(largest, nn.Sequential) or not _is_row(largest):
            break
        pieces = _pieces(largest)
        others = [*(block for block in whole if block is not largest), *chain(*cut.values())]
        if _cost([*others, *pieces], total) >= _cost([*others, largest], total):
            break
        whole.remove(largest)
        cut[largest] = pieces
    return Blocks(whole, list(cut.items()), compiled)


def is_compiled(module: nn.Module) -> bool:
    """By ``torch.compile(module)`` or ``module.compile()``."""
    # By its name: to import it takes seconds, and whoever has one has imported it.
    return (
        type(module).__name__ == "OptimizedModule"
        or getattr(module, "_compiled_call_impl", None) is not None
    )


def _repeated(root: nn.Module) -> list[nn.Module]:
    """The outermost blocks below a module, each once; the module itself is none."""
    if is_compiled(root) or isinstance(root, _OPAQUE):
        return []
    family = [
        child
        for child in _family(root)
        if not isinstance(child, _OPAQUE) and (_has_children(child) or is_compiled(child))
    ]
    kinds = Counter(type(child) for child in family)
    if any(count > 1 for count in kinds.values()):
        return family
    return list(dict.fromkeys(block for child in family for block in _repeated(child)))


def _within_reach(module: nn.Module) -> Iterator[nn.Module]:
    """It and all below, but for what is inside of compiled or scripted code."""
    if not is_compiled(module) and not isinstance(module, _OPAQUE):
        yield module
        for child in module._modules.values():
            if child is not None:
                yield from _within_reach(child)


def _family(module: nn.Module) -> list[nn.Module]:
    """The children, and instead of those that are only lists, theirs."""
    family: dict[nn.Module, None] = {}
    for child in module._modules.values():
        if child is None:
            continue
        is_list = _goes_as(child, nn.Module)
        family.update(dict.fromkeys(_family(child) if is_list else [child]))
    return list(family)


def _goes_as(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether its forward is that of ``kind``; ``nn.Module`` itself has none."""
    return not isinstance(module, _OPAQUE) and type(module).forward is kind.forward


def _is_row(module: nn.Module) -> bool:
    return _goes_as(module, nn.Sequential)


def _has_children(module: nn.Module) -> bool:
    return any(child is not None for child in module._modules.values())


def _layers(module: nn.Module) -> int:
    """How many modules do the work: those without children."""
    return sum(not _has_children(below) for below in modules_below([module]))


def _cost(blocks: Sequence[nn.Module], total: int) -> int:
    layers = [_layers(block) for block in blocks]
    return len(blocks) + max(layers) + total - sum(layers)


def _pieces(sequence: nn.Sequential) -> list[nn.Sequential]:
    children = list(sequence)
    size = math.isqrt(len(children) - 1) + 1
    return [
        nn.Sequential(*children[start : start + size]) for start in range(0, len(children), size)
    ]


def _compiled_name(model: nn.Module) -> str | None:
    for name, module in model.named_modules():
        if is_compiled(module):
            return name or type(module).__name__
    return None
