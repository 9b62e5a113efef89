"""Hooks that hand over each parameter's gradient the moment autograd has finished it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.utils.hooks import RemovableHandle

Receiver = Callable[[int, Tensor], None]


class GradientHooks:
    """Post-accumulate hooks on parameters, idle unless a receiver listens.

    They stay installed between steps, where they cost one comparison per gradient: installing and
    removing them each time would cost a small model a noticeable part of its step. They go when
    :meth:`remove` is called or this object is collected.

    Attributes:
        parameters: all parameters, watched or not.
        names: what errors call them.
        unwatched: positions of those without a hook: autograd adds up their gradients in ``p.grad``.
    """

    def __init__(
        self, parameters: Sequence[Tensor], names: Sequence[str], unwatched: Iterable[int]
    ) -> None:
        self.parameters = parameters
        self.names = names
        self.unwatched = set(range(len(parameters)))
        self._position_of = {id(parameter): i for i, parameter in enumerate(parameters)}
        self._slot: list[Receiver | None] = [None]
        # Parameters whose gradient went another way: autograd runs their hooks all the same.
        self._bypassed: set[int] = set()
        # The closures must not own this object: a parameter would keep it alive for ever.
        self._handles: list[RemovableHandle] = []
        self._finalizer = weakref.finalize(self, _remove_all, self._handles)
        self.watch(self.unwatched.difference(unwatched))

    def watch(self, positions: Iterable[int]) -> None:
        """Installs hooks where there are none yet."""
        for position in sorted(self.unwatched.intersection(positions)):
            hook = _make_hook(position, self.names[position], self._slot, self._bypassed)
            self._handles.append(self.parameters[position].register_post_accumulate_grad_hook(hook))
            self.unwatched.remove(position)

    @contextmanager
    def delivering_to(self, receiver: Receiver) -> Iterator[None]:
        """While inside, every finished gradient of a watched parameter goes to
        ``receiver(position, gradient)`` and leaves ``p.grad``."""
        self._slot[0] = receiver
        self._bypassed.clear()
        try:
            yield
        finally:
            self._slot[0] = None

    def deliver(self, leaf: Tensor, gradient: Tensor) -> None:
        """Hands over a gradient that :func:`torch.autograd.grad` computed as ``backward`` would have."""
        position = self._position_of.get(id(leaf))
        receiver = self._slot[0]
        if (
            receiver is not None
            and position is not None
            and position not in self.unwatched
            and len(leaf._post_accumulate_grad_hooks) == 1
        ):
            receiver(position, gradient)
        else:
            # What autograd itself would call: it adds to .grad and runs the hooks that are there.
            accumulate: Any = get_gradient_edge(leaf).node
            with torch.no_grad():
                accumulate(gradient)

    def bypass(self, position: int) -> None:
        """The gradient of this parameter does not come through its hook, in this pass."""
        self._bypassed.add(position)

    def has_no_other_hook(self, position: int) -> bool:
        """Whether nobody else has put a hook on the parameter, which would miss its gradient."""
        parameter = self.parameters[position]
        ours = 0 if position in self.unwatched else 1
        return not parameter._backward_hooks and (
            len(parameter._post_accumulate_grad_hooks or ()) == ours
        )

    def remove(self) -> None:
        self._finalizer()


def _make_hook(
    position: int, name: str, slot: list[Receiver | None], bypassed: set[int]
) -> Callable[[Tensor], None]:
    def hook(parameter: Tensor) -> None:
        receiver = slot[0]
        if receiver is None:
            return
        gradient = parameter.grad
        if gradient is None and position in bypassed:
            return
        if gradient is None:
            raise RuntimeError(
                f"another hook has taken the gradient of {name} (shape {tuple(parameter.shape)}) before "
                "it could be accumulated; remove that hook, or let it act after step()"
            )
        parameter.grad = None
        receiver(position, gradient)

    return hook


def _remove_all(handles: Sequence[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
