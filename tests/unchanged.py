"""Shows that a failed step has changed nothing."""

from __future__ import annotations

import copy
from typing import Any

import torch
from reference.full_batch import gradients_of
from torch import Tensor, nn


class State:
    """All that a failed step must leave bitwise as it was."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer
        self.tensors = {name: t.detach().clone() for name, t in model.state_dict().items()}
        self.buffers = dict(model.named_buffers())
        self.gradients = {name: p.grad for name, p in model.named_parameters()}
        self.copies = gradients_of(model)
        self.optimizer_state = copy.deepcopy(optimizer.state_dict())

    def check(self) -> None:
        now = self.model.state_dict()
        assert now.keys() == self.tensors.keys()
        changed = [name for name, t in self.tensors.items() if not same_bits(now[name], t)]
        assert not changed, f"changed: {changed}"
        for name, buffer in self.model.named_buffers():
            assert buffer is self.buffers[name], f"{name} is another tensor"
        for name, parameter in self.model.named_parameters():
            assert parameter.grad is self.gradients[name], f"{name}.grad is another tensor"
            copied = self.copies[name]
            assert copied is None or same_bits(parameter.grad, copied), f"{name}.grad changed"
        check_equal(self.optimizer.state_dict(), self.optimizer_state)


def same_bits(a: Tensor | None, b: Tensor) -> bool:
    return a is not None and a.dtype == b.dtype and a.numpy().tobytes() == b.numpy().tobytes()


def check_equal(actual: Any, expected: Any) -> None:
    if isinstance(expected, Tensor):
        assert same_bits(actual, expected)
    elif isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        for key in expected:
            check_equal(actual[key], expected[key])
    else:
        assert actual == expected
