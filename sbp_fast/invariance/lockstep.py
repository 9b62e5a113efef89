"""Runs the micro-batches of a large batch in lockstep: all forward to the next meeting point, then on.

Every micro-batch runs on a stack of its own, a greenlet, so that an unmodified model can be suspended in
the middle of its forward pass. One runs at a time, on the caller's thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch
from greenlet import GreenletExit, getcurrent, greenlet

from ..memory.host_store import HostStore
from .dropout import Draws
from .sampling import Sampling
from .thread_state import ThreadState, why_not_suspendable

Result = TypeVar("Result")


class Member(Generic[Result]):
    """One micro-batch of the large batch: its stack while it runs, its result afterwards."""

    def __init__(self, position: int, run: Callable[[], Result]) -> None:
        self.position = position
        self.result: Result | None = None
        # What it brings to the meeting point, and whether it has reached its end.
        self.message: Any = None
        self.finished = False
        self.draws: Draws | None = None
        self._run = run
        self._greenlet = greenlet(self._go)
        self._state: ThreadState | None = None
        self._needs: list[Any] = []

    def _go(self) -> None:
        self.result = self._run()
        self.finished = True
        self.message = None


class Lockstep(Generic[Result]):
    """Members and whose turn it is.

    Args:
        device: of the computation; its streams belong to what is kept per member.
        sampling: what a member draws is its own, whoever runs in between.
        store: where what a suspended member holds waits.
    """

    def __init__(self, device: torch.device, sampling: Sampling, store: HostStore) -> None:
        self._device = device
        self._sampling = sampling
        self._generators = sampling.generators
        self._store = store
        self._hub = getcurrent()
        self._last: Member[Result] | None = None
        self.current: Member[Result] | None = None
        self.members: list[Member[Result]] = []

    def start(self, run: Callable[[], Result]) -> None:
        """Adds a member and runs it to its first meeting point."""
        member: Member[Result] = Member(len(self.members), run)
        self.members.append(member)
        self.resume(member)

    def resume(self, member: Member[Result]) -> None:
        """Runs a member to its next meeting point, or to its end."""
        with self.turn(member):
            before = ThreadState.take(self._device, self._generators)
            (member._state or before).install()
            try:
                member._greenlet.switch()
            finally:
                if not member._greenlet:
                    # It has ended, and left its stacks as it found them: as copies of the hub's.
                    ThreadState.take(self._device, self._generators)
                    # Its hooks lead back to whoever leads to it.
                    member._state = None
                before.install()

    def meet(self, message: Any, where: str) -> None:
        """Called by the running member: waits until it is resumed.

        Raises:
            RuntimeError: the code that called cannot be suspended.
        """
        member = self.current
        if member is None or getcurrent() is not member._greenlet:
            raise RuntimeError(f"{where} was reached outside of the micro-batch that runs")
        obstacle = why_not_suspendable()
        if obstacle is not None:
            raise RuntimeError(
                f"{where} is {obstacle}, where the micro-batch cannot wait for the others; move it out "
                "of there, or pass batch_norm='micro_batch'"
            )
        member.message = message
        member._state = ThreadState.take(self._device, self._generators)
        self._hub.switch()

    @contextmanager
    def turn(self, member: Member[Result]) -> Iterator[None]:
        """While inside, the device is this member's: what the last one held goes to the host first."""
        if self._last is not member:
            if self._last is not None:
                self._last._needs = self._store.send_away()
            self._store.bring_back(member._needs)
            member._needs = []
            self._last = member
        self.current = member
        self._sampling.current = member.draws
        try:
            with self._store.guarding():
                yield
        finally:
            member.draws = self._sampling.current
            self._sampling.current = None
            self.current = None

    def abandon(self) -> None:
        """Ends every suspended member where it stands; their ``finally`` clauses run."""
        for member in self.members:
            if member._greenlet and not member.finished:
                before = ThreadState.take(self._device, self._generators)
                if member._state is not None:
                    member._state.install()
                member._greenlet.throw(GreenletExit)
                ThreadState.take(self._device, self._generators)
                before.install()


def in_both_directions(rounds: int, members: list[Any]) -> Iterable[Any]:
    """Every other round runs backwards, so that the last one of a round has still its memory when the
    next begins."""
    return members if rounds % 2 == 0 else reversed(members)
