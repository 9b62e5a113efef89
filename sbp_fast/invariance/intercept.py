"""Lets a large batch answer the calls of ``torch.nn.functional.batch_norm`` that its model makes.

All batch norm of torch passes through that function: the modules, subclasses that fuse an activation,
and models that call it themselves.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

_native = functional.batch_norm


class Responder(Protocol):
    """Answers batch norm in training mode."""

    thread: int
    in_backward: bool

    def is_computing(self) -> bool:
        """Whether one of its micro-batches runs now, so that a call is one of theirs."""

    def batch_norm(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        momentum: float,
        eps: float,
    ) -> Tensor: ...


_responders: list[Responder] = []
_lock = threading.Lock()


@contextmanager
def answering(responder: Responder) -> Iterator[None]:
    """While inside, calls in training mode from the responder's thread go to it. In its backward pass,
    those from autograd's threads as well: checkpoints compute their part of the model again there."""
    with _lock:
        _responders.append(responder)
        functional.batch_norm = _opaque(_batch_norm)
    try:
        yield
    finally:
        with _lock:
            _responders.remove(responder)
            if not _responders:
                functional.batch_norm = _native


def _opaque(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Not to be compiled; but to say so imports the compiler, which takes seconds."""
    return _disabled(function) if "torch._dynamo" in sys.modules else function


@functools.cache
def _disabled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    disabled: Callable[..., Tensor] = torch.compiler.disable(function)
    return disabled


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    responder = _responder() if training else None
    if responder is None:
        return _native(input, running_mean, running_var, weight, bias, training, momentum, eps)
    return responder.batch_norm(input, running_mean, running_var, weight, bias, momentum, eps)


def _responder() -> Responder | None:
    thread = threading.get_ident()
    in_autograd = torch._C._current_graph_task_id() != -1
    for responder in reversed(_responders):
        is_its_thread = responder.thread == thread or (responder.in_backward and in_autograd)
        if is_its_thread and responder.is_computing():
            return responder
    return None
