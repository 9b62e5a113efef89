"""Lets a step answer the calls of functions in ``torch.nn.functional`` that its model makes.

All of torch's own modules go through these functions, as do subclasses that fuse an activation and
models that call them directly. A model that imported a function by name is not seen.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch.nn import functional

Function = Callable[..., Any]


class Responder(Protocol):
    """Answers calls by the functions' names, with their signatures."""

    thread: int

    @property
    def answers(self) -> Mapping[str, Function]: ...

    def is_computing(self, in_autograd: bool) -> bool:
        """Whether one of its micro-batches runs now, so that a call from its thread is one of theirs.
        ``in_autograd``: the call comes out of a backward pass, perhaps on a thread of autograd's:
        checkpoints compute their part of the model again there."""


_responders: list[Responder] = []
_lock = threading.Lock()


def native(name: str) -> Function:
    """The function that torch itself has under this name."""
    return _NATIVE[name]


@contextmanager
def answering(responder: Responder) -> Iterator[None]:
    """While inside, the responder answers what its micro-batches call."""
    with _lock:
        _responders.append(responder)
        _install(responder.answers)
    try:
        yield
    finally:
        with _lock:
            _responders.remove(responder)
            _install(responder.answers)


def ask(name: str, otherwise: Function, *args: Any, **kwargs: Any) -> Any:
    """Has a responder answer the call, or, where there is none for it, calls ``otherwise``."""
    thread = threading.get_ident()
    in_autograd = torch._C._current_graph_task_id() != -1
    asked = [
        responder
        for responder in reversed(_responders)
        if name in responder.answers and responder.is_computing(in_autograd)
    ]
    for responder in asked:
        if responder.thread == thread:
            return responder.answers[name](*args, **kwargs)
    # A thread of autograd's works for whoever is in a backward pass.
    if in_autograd and asked and threading.current_thread() is not threading.main_thread():
        return asked[0].answers[name](*args, **kwargs)
    return otherwise(*args, **kwargs)


def opaque(function: Function) -> Function:
    """Not to be compiled; but to say so imports the compiler, which takes seconds."""
    return _disabled(function) if "torch._dynamo" in sys.modules else function


@functools.cache
def _disabled(function: Function) -> Function:
    disabled: Function = torch.compiler.disable(function)
    return disabled


def _install(names: Mapping[str, Function]) -> None:
    for name in names:
        if hasattr(functional, name):
            asked = any(name in responder.answers for responder in _responders)
            setattr(functional, name, opaque(_ASKING[name]) if asked else _NATIVE[name])


def _asking(name: str) -> Function:
    function = _NATIVE[name]

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return ask(name, function, *args, **kwargs)

    return call


_NATIVE: dict[str, Function] = {
    name: getattr(functional, name)
    for name in (
        "batch_norm",
        "dropout",
        "alpha_dropout",
        "dropout1d",
        "dropout2d",
        "dropout3d",
        "feature_alpha_dropout",
    )
}
_ASKING = {name: _asking(name) for name in _NATIVE}
