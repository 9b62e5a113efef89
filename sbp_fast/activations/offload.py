"""What autograd saves waits in host memory, and comes back shortly before it is needed.

On CUDA all copies are made on one side stream, and events keep four orders:

1. The side stream waits for what the main stream had in flight before it reads or writes memory of the
   device: it is written there, or was freed by work that is still running.
2. Memory goes back to the allocator only when its copy to the host is known to be over, or the main
   stream has been told to wait for it.
3. The main stream waits for a copy to the device before it computes with it, or frees its memory.
4. Pinned memory is read and written by the side stream alone, so it is in order by itself.

Device memory is allocated on the main stream, so the caching allocator needs no ``record_stream``. On
the CPU contents stay where they are and only change the account (:mod:`sbp_fast.memory.host_store`).
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ..memory import LiveBytes
from ..memory.host_store import DEVICE, HOST, Held, HostStore, Slot
from .pinned_pool import PinnedPool

# Below this, starting a copy takes longer than the copy (PCIe moves it in about a microsecond).
_SMALLEST_BYTES = 32 << 10

# Storages that are brought back before their turn, and that may be on their way out at once.
_AHEAD = 2
_MOST_LEAVING = 2


class Offload:
    """``activations="offload"``.

    Args:
        modules: of the step; their parameters and buffers are nobody's to send away.
        budget: bytes of host memory; what is beyond stays on the device. None for no bound.
    """

    def __init__(self, modules: Sequence[nn.Module], budget: int | None) -> None:
        self._modules = modules
        self._budget = budget
        self._lanes: dict[torch.device, Lane] = {}

    def __str__(self) -> str:
        return "offload"

    @contextmanager
    def during(
        self,
        device: torch.device,
        counter: LiveBytes | None,
        *,
        meets: Callable[[Sequence[nn.Module]], bool] | None,
    ) -> Iterator[HostStore | None]:
        """While inside, large tensors that autograd saves go to the host.

        Nothing is left to do where micro-batches wait for one another: all that waits is there already.
        """
        if meets is not None:
            yield None
            return
        lane = None
        if device.type == "cuda":
            lane = self._lanes.get(device)
            if lane is None:
                lane = self._lanes[device] = Lane(device)
        store = OffloadStore(device, self._budget, counter, lane)
        for module in self._modules:
            store.leave_alone((*module.parameters(), *module.buffers()))
        with saved_tensors_hooks(store.hold, store.take):
            try:
                yield store
            finally:
                if lane is not None:
                    lane.join()


class Lane:
    """The side stream of one device, and the pinned memory at its other end. Kept from step to step."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool = PinnedPool()
        self._side = torch.cuda.Stream(device)

    def copy(self, target: Tensor, source: Tensor) -> torch.cuda.Event:
        """Enqueues a copy behind all that the main stream has in flight; the event marks its end."""
        self._side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._side):
            target.copy_(source, non_blocking=True)
            event = torch.cuda.Event()
            event.record(self._side)
            return event

    def wait_for(self, event: torch.cuda.Event) -> None:
        """Makes the main stream wait."""
        torch.cuda.current_stream(self.device).wait_event(event)

    def join(self) -> None:
        """Makes the main stream wait for everything."""
        torch.cuda.current_stream(self.device).wait_stream(self._side)


class _Traveller(Slot):
    """A storage with its place in the order of saving."""

    def __init__(self, store: HostStore, storage: torch.UntypedStorage, position: int) -> None:
        super().__init__(store, storage)
        self.position = position
        self.pinned: Tensor | None = None
        # Of the last copy either way, while it may be on its way.
        self.leaving: torch.cuda.Event | None = None
        self.arriving: torch.cuda.Event | None = None


class OffloadStore(HostStore):
    """Sends a storage away as soon as nobody but autograd has it, and brings it back ahead of time.

    Args:
        lane: how contents travel; None where they need not.
    """

    def __init__(
        self,
        device: torch.device,
        budget: int | None,
        counter: LiveBytes | None,
        lane: Lane | None,
    ) -> None:
        super().__init__(device, budget, counter=counter, smallest=_SMALLEST_BYTES)
        self._lane = lane
        self._order: list[weakref.ref[_Traveller]] = []
        self._leaving: deque[tuple[weakref.ref[_Traveller], torch.cuda.Event]] = deque()

    # What autograd calls

    def hold(self, tensor: Tensor) -> Held:
        """As a pack hook: keeps what is saved."""
        if torch._C._current_graph_task_id() != -1:
            # Saved within a backward pass: wanted there, at once.
            return Held(tensor.detach(), None)
        self.send_unshared()
        return super().hold(tensor)

    def take(self, held: Held) -> Tensor:
        """As an unpack hook: on the device, and on the way there what was saved before it.

        Raises:
            RuntimeError: it was modified in place since; autograd's own words.
        """
        tensor = held.take()
        slot = held.slot
        if isinstance(slot, _Traveller):
            self._arrive(slot)
            self._bring_those_before(slot)
        return tensor

    def _bring_those_before(self, slot: _Traveller) -> None:
        """Backward passes want them in reverse order."""
        ahead = 0
        for position in range(slot.position - 1, -1, -1):
            other = self._order[position]()
            if other is not None:
                self.bring_back((other,))
                ahead += 1
            if ahead == _AHEAD:
                break

    def _new_slot(self, storage: torch.UntypedStorage) -> Slot:
        while self._order and self._order[-1]() is None:
            self._order.pop()
        slot = _Traveller(self, storage, len(self._order))
        self._order.append(weakref.ref(slot))
        return slot

    # Travelling

    def _send(self, slot: Slot) -> None:
        if self._lane is None:
            super()._send(slot)
            return
        assert isinstance(slot, _Traveller)
        slot.pinned = self._lane.pool.take(slot.nbytes)
        slot.leaving = self._lane.copy(slot.pinned[: slot.nbytes], _bytes_of(slot))
        slot.place = HOST
        self._account(HOST, slot.nbytes)
        self._leaving.append((weakref.ref(slot), slot.leaving))
        self._free_what_has_left(self._lane)

    def _free_what_has_left(self, lane: Lane) -> None:
        while self._leaving:
            reference, event = self._leaving[0]
            if not event.query():
                if len(self._leaving) <= _MOST_LEAVING:
                    return
                lane.wait_for(event)
            self._leaving.popleft()
            slot = reference()
            # It may have been wanted again before it was gone.
            if slot is not None and slot.leaving is event:
                slot.storage.resize_(0)

    def _bring(self, slot: Slot) -> None:
        if self._lane is None:
            super()._bring(slot)
            return
        assert isinstance(slot, _Traveller)
        self._refill(slot, self._lane)
        self._account(HOST, -slot.nbytes)
        slot.place = DEVICE
        self._on_device.append(weakref.ref(slot))

    def _refill(self, slot: _Traveller, lane: Lane) -> None:
        pinned, slot.pinned, slot.leaving = slot.pinned, None, None
        assert pinned is not None
        if slot.storage.nbytes() == 0:
            slot.storage.resize_(slot.nbytes)
            slot.arriving = lane.copy(_bytes_of(slot), pinned[: slot.nbytes])
        lane.pool.give_back(pinned)

    def _arrive(self, slot: _Traveller) -> None:
        if slot.arriving is not None and self._lane is not None:
            self._lane.wait_for(slot.arriving)
            slot.arriving = None

    def _forget(self, slot: Slot) -> None:
        if self._lane is None:
            super()._forget(slot)
            return
        assert isinstance(slot, _Traveller)
        if slot.pinned is not None:
            if slot.is_shared():
                # A tensor that outlives the step, in an attribute of a module, say.
                self._refill(slot, self._lane)
            else:
                self._lane.pool.give_back(slot.pinned)
        # Its memory goes back to the allocator now.
        self._arrive(slot)
        self._account(slot.place, -slot.nbytes)


def _bytes_of(slot: Slot) -> Tensor:
    memory = torch.empty(0, dtype=torch.uint8, device=slot.storage.device)
    return memory.set_(slot.storage)
