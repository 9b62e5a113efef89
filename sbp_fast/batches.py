"""Splits a large batch into micro-batches.

A batch is a pytree: tensors, NumPy arrays (memory-mapped ones included) and `Rows` in dicts, lists,
tuples or named tuples, nested as one likes. Their first dimension counts the samples. Everything else in
the tree, and tensors of no dimension, go to every micro-batch as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, is_dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .data.rows import Rows
from .host_memory import host_memory

PyTree = Any


@dataclass(frozen=True)
class MicroBatch:
    """One piece of a large batch, still where the large batch lies.

    ``cut_from``: the inputs and targets, of a large batch or of one item of a stream, whose rows these
    are; None once they have left for a device. ``borrowed``: their memory is the caller's, or host memory
    of the stream's, and no memory of the device.
    """

    inputs: PyTree
    targets: PyTree
    samples: int
    cut_from: tuple[PyTree, PyTree] | None = None
    borrowed: bool = True

    def tensors(self) -> list[Tensor]:
        leaves = pytree.tree_leaves((self.inputs, self.targets))
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    def versions(self) -> list[int]:
        """Of all tensors: another one where somebody has written to it."""
        return [tensor._version for tensor in self.tensors() if not tensor.is_inference()]


def is_stream(inputs: PyTree) -> bool:
    """True for an iterable of micro-batches (a generator, a DataLoader), False for a pytree."""
    return isinstance(inputs, Iterable) and not isinstance(
        inputs, (Tensor, np.ndarray, Mapping, list, tuple, str, bytes)
    )


def split(
    inputs: PyTree, targets: PyTree, micro_batch_size: int, *, with_targets: bool
) -> list[MicroBatch]:
    """Cuts a large batch into pieces of ``micro_batch_size`` samples; the last one may be smaller.

    Pieces are views wherever memory allows, so nothing is copied here.

    Args:
        with_targets: there is a ``loss_fn``, so there must be targets; otherwise there must be none.

    Raises:
        ValueError: no samples, leaves that disagree about how many samples there are, targets that are
            missing or that nobody would look at.
    """
    if with_targets and targets is None:
        raise ValueError(
            "targets are None although there is a loss_fn; pass targets, or loss_fn=None for a model "
            "that returns its own loss (a list of micro-batches is passed as iter(list))"
        )
    if not with_targets and targets is not None:
        raise ValueError(
            f"targets are a {type(targets).__name__} although loss_fn is None; put them into the inputs "
            "(as labels, say) of the model that returns its own loss"
        )
    inputs, targets = _plain(inputs), _plain(targets)
    samples = count_samples(inputs, targets)
    return [
        MicroBatch(
            inputs=rows(inputs, start, min(start + micro_batch_size, samples)),
            targets=rows(targets, start, min(start + micro_batch_size, samples)),
            samples=min(micro_batch_size, samples - start),
            cut_from=(inputs, targets),
        )
        for start in range(0, samples, micro_batch_size)
    ]


def split_stream(
    stream: Iterable[Any], micro_batch_size: int, *, with_targets: bool
) -> Iterator[MicroBatch]:
    """Cuts every item of ``stream`` into pieces of at most ``micro_batch_size`` samples.

    Args:
        with_targets: items are ``(inputs, targets)`` pairs; otherwise an item is the inputs.

    Raises:
        ValueError: the stream is empty, or an item is no pair although targets are needed.
    """
    empty = True
    for position, item in enumerate(stream):
        empty = False
        if not with_targets:
            inputs, targets = item, None
        elif isinstance(item, (tuple, list)) and len(item) == 2:
            inputs, targets = item
        else:
            raise ValueError(
                f"item {position} of the stream of micro-batches is a {type(item).__name__}; "
                "it must be a pair (inputs, targets), since there is a loss_fn"
            )
        yield from split(inputs, targets, micro_batch_size, with_targets=with_targets)
    if empty:
        raise ValueError(
            "the stream of micro-batches is empty; a large batch needs at least one sample "
            "(a generator that has already been consumed gives nothing a second time)"
        )


def begun(stream: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
    """The same stream, of which the first micro-batch has been taken already."""
    return chain((next(stream),), stream)


def cut(micro_batch: MicroBatch, size: int) -> list[MicroBatch]:
    """Pieces of at most ``size`` samples, as views; the micro-batch itself where it has no more."""
    if micro_batch.samples <= size:
        return [micro_batch]
    return [
        part_of(micro_batch, start, min(start + size, micro_batch.samples))
        for start in range(0, micro_batch.samples, size)
    ]


def part_of(micro_batch: MicroBatch, start: int, stop: int) -> MicroBatch:
    """Its samples from ``start`` to ``stop``, as views."""
    return MicroBatch(
        rows(micro_batch.inputs, start, stop),
        rows(micro_batch.targets, start, stop),
        stop - start,
        cut_from=micro_batch.cut_from,
        borrowed=micro_batch.borrowed,
    )


def count_samples(inputs: PyTree, targets: PyTree) -> int:
    """The number of samples that all leaves agree on.

    Raises:
        ValueError: there are none, or the leaves disagree; the message names the leaf.
    """
    counted: list[tuple[str, int]] = []
    for name, tree in (("inputs", inputs), ("targets", targets)):
        for path, leaf in pytree.tree_flatten_with_path(tree)[0]:
            if has_samples(leaf):
                if isinstance(leaf, Tensor) and leaf.grad_fn is not None:
                    raise ValueError(
                        f"{name}{pytree.keystr(path)} was computed with gradients, and each micro-batch "
                        "would go back through its graph; pass it with .detach(), or make what computes "
                        "it part of the model"
                    )
                counted.append((name + pytree.keystr(path), leaf.shape[0]))
            elif isinstance(leaf, Iterable) and not isinstance(leaf, (str, bytes, Tensor)):
                raise ValueError(
                    f"{name}{pytree.keystr(path)} is a {type(leaf).__name__}; a batch is made of "
                    "tensors and NumPy arrays in dicts, lists and tuples: convert it first"
                )
            elif is_dataclass(leaf) and any(map(has_samples, vars(leaf).values())):
                raise ValueError(
                    f"{name}{pytree.keystr(path)} is a {type(leaf).__name__}, a dataclass whose tensors "
                    "would not be split; pass a dict, or register it as a pytree "
                    "(torch.utils._pytree.register_dataclass)"
                )
    if not counted:
        raise ValueError(
            "the batch holds no tensor with a first dimension to split; "
            "inputs must have shape (samples, ...)"
        )
    first_name, samples = counted[0]
    for name, length in counted[1:]:
        if length != samples:
            raise ValueError(
                f"{name} has {length} samples but {first_name} has {samples}; "
                "the first dimensions of inputs and targets must be equal"
            )
    if samples == 0:
        raise ValueError(
            f"{first_name} has 0 samples; a large batch needs at least one. "
            "Leave an empty batch out of the loop"
        )
    return samples


def whole_of(micro_batches: Iterable[MicroBatch]) -> MicroBatch | None:
    """The large batch that these are pieces of; None for a stream, which is not known."""
    if not isinstance(micro_batches, list):
        return None
    inputs, targets = micro_batches[0].cut_from
    return MicroBatch(inputs, targets, count_samples(inputs, targets))


def first_samples(micro_batch: MicroBatch, most: int) -> MicroBatch:
    """The first samples, ``most`` at most, of what a micro-batch was cut from."""
    assert micro_batch.cut_from is not None
    inputs, targets = micro_batch.cut_from
    samples = min(most, count_samples(inputs, targets))
    return MicroBatch(rows(inputs, 0, samples), rows(targets, 0, samples), samples)


def has_samples(leaf: Any) -> bool:
    """True where the leaf's first dimension counts samples."""
    return isinstance(leaf, (Tensor, np.ndarray, Rows)) and leaf.ndim > 0


def as_tensor(leaf: np.ndarray[Any, Any] | Rows) -> Tensor:
    """Rows, gathered; or a tensor over a NumPy array's memory, copied where that cannot be viewed."""
    if isinstance(leaf, Rows):
        with host_memory():
            return leaf.gather()
    if not can_be_viewed(leaf):
        leaf = np.array(leaf, order="C")
    return torch.from_numpy(leaf)


def can_be_viewed(array: np.ndarray[Any, Any]) -> bool:
    """Not where the array cannot be written (memory maps) or runs backwards: no tensor can."""
    return (
        array.flags.writeable
        and not isinstance(array, np.memmap)
        and min(array.strides, default=0) >= 0
    )


def gathered(tree: PyTree) -> PyTree:
    """With tensors for all `Rows`."""
    return pytree.tree_map_only(Rows, as_tensor, tree)


def _plain(tree: PyTree) -> PyTree:
    # Mappings of other libraries (a tokenizer's BatchEncoding, say) are leaves to a pytree.
    if isinstance(tree, Mapping) and not isinstance(tree, dict):
        return dict(tree)
    return tree


def rows(tree: PyTree, start: int, stop: int) -> PyTree:
    """The samples from ``start`` to ``stop`` of every leaf that has samples, as views."""
    return pytree.tree_map(lambda leaf: leaf[start:stop] if has_samples(leaf) else leaf, tree)


def copied(tree: PyTree) -> PyTree:
    """With copies of all tensors: models write to their inputs, and losses to theirs."""
    return pytree.tree_map_only(Tensor, Tensor.clone, tree)
