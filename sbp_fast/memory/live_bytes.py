"""Count the bytes of the tensors alive on the CPU, and enforce a limit on them as a device would.

The CPU plays host and device at once. What is created while `LiveBytes` is active (activations,
gradients, what autograd saves, optimizer state) is device memory, and so is what `track` registers
(the model's parameters). All else (the data set, the large batch that waits) is host memory and is
not counted: neither is a view of it.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .budget import format_bytes

CPU = torch.device("cpu")


class StorageReference(weakref.ref[torch.UntypedStorage]):
    """A weak reference that remembers, once its storage is gone, which it was and its size."""

    __slots__ = ("key", "size")

    key: int
    size: int


class LiveBytes(TorchDispatchMode):
    """Counts live tensor bytes on the CPU; raises torch.OutOfMemoryError above `limit_bytes`.

    A context manager. Counted per storage, so views and in-place operations add nothing, and a
    storage counts until its last tensor is gone, wherever that is (autograd's graph, `p.grad`,
    outside of the `with` block). The operation that would take the count over the limit is undone:
    its result is freed, never counted, and the error is raised in its place. What it changed in
    place (say a batch norm's running statistics) stays changed.

    Not seen: scratch memory inside one operation (a convolution's reordered weights), sparse
    tensors, and tensor subclasses that wrap others. Data that comes from Python lists or numpy
    counts as the host's.

    Its price is some 10 microseconds an operation: 5 to 9 % of the time of the demo's step.

    It may be left and entered again, and nested: each instance counts for itself.
    `torch.distributed._tools`' MemTracker counts in the same way, but has no limit, hooks every
    module and copies a snapshot at each of their calls, and refuses a second call of the root
    module, which is what a split batch consists of.
    """

    def __init__(self, limit_bytes: int | None = None) -> None:
        """`limit_bytes`: None counts only. Raises ValueError below 1."""
        super().__init__()  # type: ignore[no-untyped-call]
        if limit_bytes is not None and limit_bytes < 1:
            raise ValueError(
                f"limit_bytes is {limit_bytes}, expected at least 1, or None for no limit"
            )
        self.limit_bytes = limit_bytes
        self.live_bytes = 0
        self.peak_bytes = 0
        self._references: dict[int, StorageReference] = {}
        # The callbacks outlive the `with` block: they must not keep this object alive.
        weak_self = weakref.ref(self)

        def forget(reference: weakref.ref[torch.UntypedStorage]) -> None:
            counter = weak_self()
            if counter is not None and isinstance(reference, StorageReference):
                del counter._references[reference.key]
                counter.live_bytes -= reference.size

        self._forget = forget

    def reset_peak(self) -> None:
        """Start a new measurement: the peak becomes what is live now."""
        self.peak_bytes = self.live_bytes

    def track(self, tensors: Iterable[Tensor]) -> None:
        """Declare tensors made earlier (parameters, buffers) to be device memory.

        Those known already are skipped. Raises torch.OutOfMemoryError, and counts none of them, if
        they do not fit.
        """
        self._count("track", (), {}, tuple(tensors))

    def set_aside(self, storage: torch.UntypedStorage) -> None:
        """From here on what lies in this storage is host memory: it waits there."""
        reference = self._references.pop(storage._cdata, None)
        if reference is not None:
            self.live_bytes -= reference.size

    def take_back(self, storage: torch.UntypedStorage) -> None:
        """What was set aside is device memory again. Raises torch.OutOfMemoryError if it does not fit."""
        if storage._cdata not in self._references:
            self._write_down("take_back", {storage._cdata: (storage, self.bytes_of(storage))})

    def bytes_in(self, tensors: Iterable[Tensor]) -> int:
        """How many of the live bytes are those of these tensors."""
        storages = {
            storage._cdata for storage in map(self.storage_of, tensors) if storage is not None
        }
        return sum(map(self._known_bytes, storages))

    def storage_of(self, value: object) -> torch.UntypedStorage | None:
        """The storage that a value has on the device; None for all else."""
        return cpu_storage(value)

    def bytes_of(self, storage: torch.UntypedStorage) -> int:
        """What a storage takes of the device's memory."""
        return storage.nbytes()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        outputs = func(*args, **kwargs)
        if is_pure_view(func):
            return outputs
        try:
            if isinstance(outputs, Tensor):
                self._count(func, args, kwargs, (outputs,))
            elif isinstance(outputs, (list, tuple)):
                self._count(func, args, kwargs, outputs)
        except torch.OutOfMemoryError:
            # The traceback keeps this frame: it must not keep the memory that there is no room for.
            del outputs, args, kwargs
            raise
        return outputs

    def _count(
        self, name: object, args: Sequence[Any], kwargs: Mapping[str, Any], outputs: Sequence[Any]
    ) -> None:
        # 1. Find what the operation allocated: new storages, and known ones that it has resized.
        grown: dict[int, tuple[torch.UntypedStorage, int]] = {}
        for output in outputs:
            storage = self.storage_of(output)
            if storage is None:
                continue
            key, size = storage._cdata, self.bytes_of(storage)
            known = self._references.get(key)
            if known is not None:
                if size == known.size:
                    continue
            elif (
                key in grown
                or self._is_storage_of_any(key, args)
                or self._is_storage_of_any(key, kwargs.values())
            ):
                continue
            grown[key] = (storage, size)
        if not grown:
            return
        # The traceback of a refusal keeps this frame: it must not keep what was refused.
        del storage, output, outputs, args, kwargs
        self._write_down(name, grown)

    def _write_down(self, name: object, grown: dict[int, tuple[torch.UntypedStorage, int]]) -> None:
        asked = sum(size - self._known_bytes(key) for key, (_, size) in grown.items())
        # 2. Refuse before anything is written down: the figures stay those of the memory in use.
        live = self.live_bytes + asked
        if self.limit_bytes is not None and live > self.limit_bytes and asked > 0:
            grown.clear()
            raise torch.OutOfMemoryError(
                f"out of memory: {name} asked for {format_bytes(asked)} while "
                f"{format_bytes(self.live_bytes)} of the {format_bytes(self.limit_bytes)} "
                "budgeted are live; use a smaller micro-batch or a larger budget"
            )
        # 3. Write it down.
        for key, (storage, size) in grown.items():
            reference = StorageReference(storage, self._forget)
            reference.key, reference.size = key, size
            self._references[key] = reference
        self.live_bytes = live
        if live > self.peak_bytes:
            self.peak_bytes = live

    def _known_bytes(self, key: int) -> int:
        reference = self._references.get(key)
        return 0 if reference is None else reference.size

    def _is_storage_of_any(self, key: int, values: Iterable[Any]) -> bool:
        """Whether a tensor among an operation's arguments has this storage: the output is a view."""
        for value in values:
            if isinstance(value, (list, tuple)):
                if self._is_storage_of_any(key, value):
                    return True
            elif isinstance(value, Tensor):
                storage = self.storage_of(value)
                if storage is not None and storage._cdata == key:
                    return True
        return False


@functools.cache
def is_pure_view(func: Any) -> bool:
    """Whether an operation never allocates, so that its outputs need no look (half of all calls).

    Composite operations such as ``aten.to`` are declared views and yet may copy.
    """
    composite = torch._C.DispatchKey.CompositeImplicitAutograd
    return bool(func.is_view) and not func.has_kernel_for_dispatch_key(composite)


def cpu_storage(value: object) -> torch.UntypedStorage | None:
    """The storage of a dense tensor in real CPU memory; None for all else (fake, meta, sparse)."""
    if not isinstance(value, Tensor) or value.layout is not torch.strided:
        return None
    storage = value.untyped_storage()
    return storage if storage.device == CPU else None
