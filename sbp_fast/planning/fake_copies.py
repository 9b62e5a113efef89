"""Copies that have shapes and no memory: of a model, its loss, its optimizer, and a batch.

The copies are on the CPU, whatever the device that is planned for: torch's autograd has no place for
tensors on a device that the machine does not have. Where the device makes a difference to a step's
memory, :mod:`.fake_step` makes it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ..batches import PyTree, has_samples
from ..data.rows import Rows

LossFunction = Callable[..., Any] | None
MakeOptimizer = Callable[[Iterable[Tensor]], torch.optim.Optimizer]


def fake_copies(
    model: nn.Module, loss_fn: LossFunction, optimizer: torch.optim.Optimizer | MakeOptimizer
) -> tuple[nn.Module, LossFunction, torch.optim.Optimizer]:
    """To be called in a fake mode. What is copied stays as it is, and may be on any device, also meta.

    Raises:
        ValueError: a lazy module that has no shapes yet, or something that refuses to be copied.
        TypeError: the callable does not return an optimizer.
    """
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise ValueError(
                f"parameter {name!r} has no shape yet; run the model once on a sample first"
            )
    given = optimizer if isinstance(optimizer, torch.optim.Optimizer) else None
    with _CopyWithoutMemory():
        try:
            # Together: the optimizer's parameters are the model's, in the copy as well.
            fake_model, fake_loss_fn, copied = copy.deepcopy((model, loss_fn, given))
        except Exception as error:
            raise ValueError(
                f"the model, its loss or its optimizer cannot be copied ({type(error).__name__}: "
                f"{error}), and a plan works on copies without memory; leave out what they hold beside "
                "tensors and modules (locks, files, streams)"
            ) from error
    if not isinstance(optimizer, torch.optim.Optimizer):
        copied = optimizer(fake_model.parameters())
    if not isinstance(copied, torch.optim.Optimizer):
        raise TypeError(
            f"optimizer returned a {type(copied).__name__}; it must be a torch.optim.Optimizer, or a "
            "callable that makes one from parameters"
        )
    return fake_model, fake_loss_fn, copied


def fake_batch(tree: PyTree, samples: int) -> PyTree:
    """A batch of so many samples like those in ``tree``, to be called in a fake mode."""

    def enlarged(leaf: Any) -> Any:
        if not has_samples(leaf):
            return _Copier().copied(leaf) if isinstance(leaf, Tensor) else leaf
        if isinstance(leaf, Rows):
            leaf = torch.empty(leaf.shape, dtype=leaf.dtype)
        elif not isinstance(leaf, Tensor):
            leaf = torch.empty(leaf.shape, dtype=torch.from_numpy(leaf[:0].copy()).dtype)
        shape = (samples, *leaf.shape[1:])
        return torch.empty(
            shape, dtype=leaf.dtype, memory_format=_memory_format(leaf)
        ).requires_grad_(leaf.requires_grad)

    return pytree.tree_map(enlarged, tree)


def _memory_format(tensor: Tensor) -> torch.memory_format:
    for ndim, memory_format in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if (
            tensor.ndim == ndim
            and not tensor.is_contiguous()
            and tensor.is_contiguous(memory_format=memory_format)
        ):
            return memory_format
    return torch.contiguous_format


class _Copier:
    """Fake tensors instead of others. Those that share a storage share one in the copy."""

    def __init__(self) -> None:
        # The originals' storages are kept, so that no other gets the number of one.
        self._storages: dict[int, tuple[torch.UntypedStorage, Tensor]] = {}

    @torch.no_grad()
    def copied(self, tensor: Tensor) -> Tensor:
        if tensor.layout is not torch.strided:
            raise TypeError(
                f"a tensor of shape {tuple(tensor.shape)} has layout {tensor.layout}; only dense ones "
                "can be planned"
            )
        storage = tensor.untyped_storage()
        if storage._cdata not in self._storages:
            memory = torch.empty(storage.nbytes(), dtype=torch.uint8)
            self._storages[storage._cdata] = (storage, memory)
        memory = self._storages[storage._cdata][1]
        elements = memory[: len(memory) // tensor.itemsize * tensor.itemsize].view(tensor.dtype)
        return elements.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).detach()


_DATA = Tensor.data.__get__  # type: ignore[attr-defined]


class _CopyWithoutMemory(TorchFunctionMode):
    """While inside, ``copy.deepcopy`` copies tensors as fake ones."""

    def __init__(self) -> None:
        super().__init__()
        self._copier = _Copier()

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        # A parameter's own __deepcopy__ clones its data.
        if func == _DATA:
            return args[0]
        if func is Tensor.clone:
            return self._copier.copied(args[0])
        if func is Tensor.__deepcopy__:
            tensor, memo = args
            if id(tensor) not in memo:
                copied = self._copier.copied(tensor)
                memo[id(tensor)] = copied.requires_grad_(tensor.requires_grad)
            return memo[id(tensor)]
        return func(*args, **(kwargs or {}))
