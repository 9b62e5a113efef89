"""Runs of model and loss that leave no trace: what happens in a rehearsal has not happened."""

from __future__ import annotations

import random
import sys
import threading
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

from .transaction import Transaction

# Random numbers and filters of warnings belong to the process.
_one_at_a_time = threading.RLock()


class Rehearsal:
    """A context without gradients, after which everything is as before.

    That is: buffers, ``p.grad``, training flags, and the random numbers of torch, Python and NumPy. Not
    covered: other attributes that a model, a loss or a hook changes, and parameters that it writes to.

    Args:
        modules: the model, and the loss where it is a module.
        device: where they compute.
    """

    def __init__(self, modules: Sequence[nn.Module], device: torch.device) -> None:
        self._device = device
        self._flags = [(module, module.training) for root in modules for module in root.modules()]
        parameters = [parameter for module in modules for parameter in module.parameters()]
        self._transaction = Transaction(modules, parameters)
        self._ending = ExitStack()

    def __enter__(self) -> Rehearsal:
        with ExitStack() as ending:
            ending.enter_context(_one_at_a_time)
            self._random_states = _random_states(self._device)
            _quieten(ending)
            if "torch._dynamo" in sys.modules:
                # Compiled code would be compiled for shapes that never come again.
                ending.enter_context(torch.compiler.set_stance("force_eager"))
            ending.enter_context(torch.no_grad())
            ending.enter_context(self._transaction)
            # Before torch 2.11, copies of weights that autocast made without gradients have no graph,
            # and a context of the caller's would go on with them.
            ending.callback(torch.clear_autocast_cache)
            ending.callback(self._put_flags_back)
            ending.callback(_set_random_states, self._random_states, self._device)
            ending.callback(self._transaction.roll_back)
            self._ending = ending.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._ending.__exit__(kind, error, traceback)

    def start_over(self) -> None:
        """Puts back buffers and random numbers, and clears gradients: every run begins alike."""
        self._transaction.roll_back()
        self._transaction.clear_gradients()
        _set_random_states(self._random_states, self._device)

    def has_drawn(self) -> bool:
        """Whether random numbers have been drawn since the last beginning."""
        now, then = map(pytree.tree_leaves, (_random_states(self._device), self._random_states))
        return not all(map(np.array_equal, now, then))

    def switch_to_eval(self) -> None:
        """Until the end, without ``module.eval()``: models override it (to keep layers frozen, say)."""
        for module, _ in self._flags:
            module.training = False

    def _put_flags_back(self) -> None:
        for module, training in self._flags:
            module.training = training


def _quieten(ending: ExitStack) -> None:
    """The step itself gives all warnings that matter, also those that torch gives once.

    A checkpoint would warn here that its inputs require no gradient.
    """
    ending.enter_context(warnings.catch_warnings())
    warnings.simplefilter("ignore")
    ending.callback(torch.set_warn_always, torch.is_warn_always_enabled())
    torch.set_warn_always(True)


def _random_states(device: torch.device) -> tuple[Any, ...]:
    on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else ()
    numpy = np.random.get_state(legacy=False)
    return torch.get_rng_state(), on_device, random.getstate(), numpy


def _set_random_states(states: tuple[Any, ...], device: torch.device) -> None:
    on_host, on_device, python, numpy = states
    torch.set_rng_state(on_host)
    if device.type == "cuda":
        torch.cuda.set_rng_state(on_device, device)
    random.setstate(python)
    np.random.set_state(numpy)
