"""Hooks that hand over each parameter's gradient the moment autograd has finished it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor
from torch.nn import Parameter
from torch.utils.hooks import RemovableHandle

Receiver = Callable[[int, Tensor], None]


class GradientHooks:
    """Post-accumulate hooks on parameters, idle unless a receiver listens.

    They stay installed between steps, where they cost one comparison per gradient: installing and
    removing them each time would cost a small model a noticeable part of its step. They go when
    :meth:`remove` is called or this object is collected.
    """

    def __init__(self, parameters: Sequence[Parameter]) -> None:
        self._slot: list[Receiver | None] = [None]
        # The closures must not own this object: a parameter would keep it alive for ever.
        handles = [
            parameter.register_post_accumulate_grad_hook(_make_hook(index, self._slot))
            for index, parameter in enumerate(parameters)
        ]
        self._finalizer = weakref.finalize(self, _remove_all, handles)

    @contextmanager
    def delivering_to(self, receiver: Receiver) -> Iterator[None]:
        """While inside, every finished gradient goes to ``receiver(index, gradient)`` and leaves
        ``p.grad``."""
        self._slot[0] = receiver
        try:
            yield
        finally:
            self._slot[0] = None

    def remove(self) -> None:
        self._finalizer()


def _make_hook(index: int, slot: list[Receiver | None]) -> Callable[[Tensor], None]:
    def hook(parameter: Tensor) -> None:
        receiver = slot[0]
        if receiver is None:
            return
        gradient = parameter.grad
        if gradient is None:
            raise RuntimeError(
                f"another hook has taken the gradient of parameter {index} (shape "
                f"{tuple(parameter.shape)}) before it could be accumulated; remove that hook, or let "
                "it act after step()"
            )
        parameter.grad = None
        receiver(index, gradient)

    return hook


def _remove_all(handles: Sequence[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
