"""Where tensors wait in host memory: while others have the device, or for their backward pass.

The unit is a storage, so that what is saved twice waits once. A storage keeps its place in every tensor
that views it; only its contents go to host memory and come back. On the CPU, where the device's memory
is the host's, they stay where they are and only change the account: what waits is not device memory.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

from .budget import format_bytes
from .live_bytes import LiveBytes

# Used there, waiting there, in host memory, in a file.
DEVICE, ROOM, HOST, FILE = "device", "room", "host", "file"


class HostBudgetError(RuntimeError):
    """What waits in host memory does not fit into its budget."""


class HostStore:
    """Sends to the host what :meth:`hold` was given, and brings it back when it is wanted.

    Args:
        device: where the tensors live.
        budget: bytes of host memory; None for no bound.
        spill_directory: where files hold what is beyond the budget; None for nowhere.
        counter: the count of device memory on the CPU, where there is one.
        device_room: bytes that may wait on the device itself.
        smallest: bytes of a storage below which it is not worth the way.

    Attributes:
        host_bytes, file_bytes: what waits now.
        peak_host_bytes, peak_file_bytes: the most that waited at once.
    """

    def __init__(
        self,
        device: torch.device,
        budget: int | None = None,
        spill_directory: Path | None = None,
        counter: LiveBytes | None = None,
        device_room: int = 0,
        smallest: int = 0,
    ) -> None:
        self.device = device
        self._device_room = device_room
        self._smallest = smallest
        self._budget = budget
        self._spill_directory = spill_directory
        self._counter = counter
        self._slots: weakref.WeakValueDictionary[int, Slot] = weakref.WeakValueDictionary()
        self._on_device: list[weakref.ref[Slot]] = []
        self._resident: set[int] = set()
        self._moves = False
        self.host_bytes = 0
        self.file_bytes = 0
        self.peak_host_bytes = 0
        self.peak_file_bytes = 0

    def leave_alone(self, tensors: Iterable[Tensor]) -> None:
        """These are nobody's to send away: parameters, buffers, the micro-batches themselves."""
        self._resident.update(
            tensor.untyped_storage()._cdata
            for tensor in tensors
            if tensor.layout is torch.strided and not _is_wrapper(tensor)
        )

    def hold(self, tensor: Tensor) -> Held:
        """Takes a tensor that must be kept; it stays on the device until :meth:`send_away`."""
        if (
            tensor.layout is not torch.strided
            or _is_wrapper(tensor)
            or tensor.device != self.device
        ):
            return Held(tensor.detach(), None)
        storage = tensor.untyped_storage()
        key = storage._cdata
        is_small = storage.nbytes() < self._smallest
        if is_small or key in self._resident or not storage.resizable():
            return Held(tensor.detach(), None)
        slot = self._slots.get(key)
        if slot is None:
            slot = self._new_slot(storage)
            self._slots[key] = slot
            self._on_device.append(weakref.ref(slot))
        return Held(tensor.detach(), slot)

    def _new_slot(self, storage: torch.UntypedStorage) -> Slot:
        return Slot(self, storage)

    def held_bytes(self) -> int:
        """What is held in all, wherever it is."""
        return sum(slot.nbytes for slot in self._slots.values())

    def send_away(self) -> list[Slot]:
        """Everything held goes to the host. Returns what others hold as well (variables of a suspended
        function, say) and would miss: :meth:`bring_back` those before they go on."""
        on_device, self._on_device = self._on_device, []
        shared = []
        for reference in on_device:
            slot = reference()
            if slot is not None and slot.place is DEVICE:
                if slot.nbytes <= self._device_room:
                    self._device_room -= slot.nbytes
                    slot.place = ROOM
                    continue
                if slot.is_shared():
                    shared.append(slot)
                self._send(slot)
        return shared

    def send_unshared(self) -> None:
        """What nobody else holds any more goes to the host, as far as the budget allows."""
        remaining = []
        for reference in self._on_device:
            slot = reference()
            if slot is None or slot.place is not DEVICE:
                continue
            room = self._budget is None or self.host_bytes + slot.nbytes <= self._budget
            if room and not slot.is_shared():
                self._send(slot)
            else:
                remaining.append(reference)
        self._on_device = remaining

    def bring_back(self, slots: Iterable[Slot]) -> None:
        for slot in slots:
            if slot.is_away():
                self._bring(slot)

    def bring_back_all(self) -> None:
        """For tensors that outlive the large batch, in an attribute of a module, say."""
        self.bring_back(list(self._slots.values()))

    @contextmanager
    def guarding(self) -> Iterator[None]:
        """While inside, operations find the contents of what they are given, whoever sent them away: a
        tensor that a module keeps from call to call belongs to several micro-batches."""
        if not self._moves:
            yield
            return
        with _BringBackOnUse(self):
            yield

    def bring_back_storage(self, storage: torch.UntypedStorage) -> None:
        slot = self._slots.get(storage._cdata)
        if slot is not None and slot.is_away():
            self._bring(slot)

    def _send(self, slot: Slot) -> None:
        to_file = self._goes_to_file(slot.nbytes)
        if to_file or self.device.type != "cpu":
            contents = self._file(slot.nbytes) if to_file else self._pinned(slot.nbytes)
            # On one stream with what is computed before and after: nobody has to wait.
            contents.copy_(slot.storage, non_blocking=True)
            slot.contents = contents
            self._moves = True
            if self._counter is not None:
                self._counter.set_aside(slot.storage)
            slot.storage.resize_(0)
        elif self._counter is not None:
            self._counter.set_aside(slot.storage)
        slot.place = FILE if to_file else HOST
        self._account(slot.place, slot.nbytes)

    def _bring(self, slot: Slot) -> None:
        if slot.contents is not None:
            slot.storage.resize_(slot.nbytes)
            slot.storage.copy_(slot.contents, non_blocking=True)
            slot.contents = None
        if self._counter is not None:
            self._counter.take_back(slot.storage)
        self._account(slot.place, -slot.nbytes)
        slot.place = DEVICE
        self._on_device.append(weakref.ref(slot))

    def _forget(self, slot: Slot) -> None:
        """Nobody wants the slot any more."""
        if slot.contents is not None and slot.is_shared():
            # A tensor that outlives the step, in an attribute of a module, say.
            slot.storage.resize_(slot.nbytes)
            slot.storage.copy_(slot.contents)
        self._account(slot.place, -slot.nbytes)

    def _goes_to_file(self, nbytes: int) -> bool:
        if self._budget is None or self.host_bytes + nbytes <= self._budget:
            return False
        if self._spill_directory is None:
            raise HostBudgetError(
                f"{format_bytes(self.host_bytes + nbytes)} of activations wait in host memory, and "
                f"host_budget is {format_bytes(self._budget)}; raise it, give a spill_directory, or use "
                "a smaller large batch"
            )
        return True

    def _file(self, nbytes: int) -> torch.UntypedStorage:
        handle, path = tempfile.mkstemp(prefix="sbp_fast-", dir=self._spill_directory)
        os.close(handle)
        try:
            contents: Any = torch.UntypedStorage.from_file(path, shared=True, nbytes=nbytes)
            mapped: torch.UntypedStorage = contents
            return mapped
        finally:
            # The memory map keeps the file for as long as it is wanted, and no longer.
            os.unlink(path)

    def _pinned(self, nbytes: int) -> torch.UntypedStorage:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True).untyped_storage()

    def _account(self, place: str, nbytes: int) -> None:
        if place is HOST:
            self.host_bytes += nbytes
            self.peak_host_bytes = max(self.peak_host_bytes, self.host_bytes)
        elif place is FILE:
            self.file_bytes += nbytes
            self.peak_file_bytes = max(self.peak_file_bytes, self.file_bytes)
        elif place is ROOM:
            self._device_room -= nbytes


class Slot:
    """The contents of one storage, and where they are."""

    def __init__(self, store: HostStore, storage: torch.UntypedStorage) -> None:
        self.store = store
        self.storage = storage
        self.nbytes = storage.nbytes()
        self.place = DEVICE
        self.contents: torch.UntypedStorage | None = None
        self.holders = 0

    def is_shared(self) -> bool:
        """Whether anyone but this slot and those it was handed to has a tensor in this storage."""
        owners: int = torch._C._storage_Use_Count(self.storage._cdata)
        return owners > 1 + self.holders

    def is_away(self) -> bool:
        return self.place is HOST or self.place is FILE

    def __del__(self) -> None:
        self.store._forget(self)


class Held:
    """A tensor that waits, or would if its memory were somebody's to send away.

    Made of a detached one: what autograd saves may be the output of the very node that saves it, and
    would keep that node alive in a circle that no garbage collector sees.
    """

    __slots__ = ("_tensor", "_version", "slot")

    def __init__(self, tensor: Tensor, slot: Slot | None) -> None:
        self._tensor = tensor
        self._version = tensor._version
        self.slot = slot
        if slot is not None:
            slot.holders += 1

    def __del__(self) -> None:
        if self.slot is not None:
            self.slot.holders -= 1

    def take(self) -> Tensor:
        """The tensor, on the device.

        Raises:
            RuntimeError: it was modified in place since; autograd's own words.
        """
        if self._tensor._version != self._version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace "
                f"operation: a tensor of shape {tuple(self._tensor.shape)} is at version "
                f"{self._tensor._version}; expected version {self._version} instead"
            )
        if self.slot is not None and self.slot.is_away():
            self.slot.store.bring_back((self.slot,))
        return self._tensor


class _BringBackOnUse(TorchDispatchMode):
    def __init__(self, store: HostStore) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._store = store

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        for value in (*args, *kwargs.values()):
            for tensor in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(tensor, Tensor) and tensor.layout is torch.strided:
                    self._store.bring_back_storage(tensor.untyped_storage())
        return func(*args, **kwargs)


def _is_wrapper(tensor: Tensor) -> bool:
    return type(tensor) not in _PLAIN and is_traceable_wrapper_subclass(tensor)


_PLAIN = (Tensor, torch.nn.Parameter)
