"""The batch norm layers of a model: whether there are any, their names, and what they count."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def has_batch_norm(modules: Sequence[nn.Module]) -> bool:
    """Whether any layer normalises with the statistics of what it is given.

    Raises:
        RuntimeError: one does that out of reach, in a scripted module.
        NotImplementedError: one does that over several processes.
    """
    found = False
    for module in modules:
        for name, layer in module.named_modules():
            if isinstance(layer, _BatchNorm):
                _check_one_process(name, layer)
                found |= layer.training or layer.running_mean is None
            elif _is_scripted_batch_norm(layer) and layer.training:
                raise RuntimeError(
                    f"batch norm {name!r} is in a scripted module, whose code cannot be suspended; pass "
                    "the model from before torch.jit.script, or batch_norm='micro_batch'"
                )
    return found


def _check_one_process(name: str, layer: nn.Module) -> None:
    if not (isinstance(layer, nn.SyncBatchNorm) and layer.training and dist.is_initialized()):
        return
    processes = dist.get_world_size(layer.process_group)
    if processes > 1:
        raise NotImplementedError(
            f"batch norm {name!r} is a SyncBatchNorm over {processes} processes; statistics over "
            "micro-batches and processes together are not available yet: pass batch_norm='micro_batch'"
        )


def _is_scripted_batch_norm(layer: nn.Module) -> bool:
    return isinstance(layer, torch.jit.ScriptModule) and layer.original_name.startswith(
        ("BatchNorm", "SyncBatchNorm")
    )


class Layers:
    """Their names, and how many batches they have seen."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._by_tensor: dict[int, tuple[str, _BatchNorm]] = {}
        self._counts: dict[_BatchNorm, Tensor] = {}
        for module in modules:
            for name, layer in module.named_modules():
                if isinstance(layer, _BatchNorm):
                    for tensor in (layer.weight, layer.running_mean):
                        if tensor is not None:
                            self._by_tensor[id(tensor)] = name, layer

    def name_of(self, running_mean: Tensor | None, weight: Tensor | None) -> str:
        for tensor in (running_mean, weight):
            if tensor is not None and id(tensor) in self._by_tensor:
                return repr(self._by_tensor[id(tensor)][0])
        return "of no layer with a name"

    def note_count(self, running_mean: Tensor | None) -> None:
        """A layer has counted the batch for one micro-batch: only the first is to count."""
        if running_mean is not None and id(running_mean) in self._by_tensor:
            layer = self._by_tensor[id(running_mean)][1]
            if layer.num_batches_tracked is not None and layer not in self._counts:
                self._counts[layer] = layer.num_batches_tracked.clone()

    def count_once(self) -> None:
        self._put_back(self._counts)
        self._counts.clear()

    @contextmanager
    def counts_kept(self) -> Iterator[None]:
        """What checkpoints compute again is not counted again."""
        layers = {layer for _, layer in self._by_tensor.values()}
        counts = {
            layer: layer.num_batches_tracked.clone()
            for layer in layers
            if layer.num_batches_tracked is not None
        }
        try:
            yield
        finally:
            self._put_back(counts)

    @staticmethod
    def _put_back(counts: dict[_BatchNorm, Tensor]) -> None:
        for layer, count in counts.items():
            assert layer.num_batches_tracked is not None
            layer.num_batches_tracked.copy_(count)
