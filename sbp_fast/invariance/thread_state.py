"""What torch keeps per thread. Micro-batches that take turns on one thread must each keep their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import _get_current_function_mode_stack
from torch.overrides import _pop_mode as _pop_function_mode
from torch.overrides import _push_mode as _push_function_mode
from torch.utils._python_dispatch import (
    _get_current_dispatch_mode_stack,
    _pop_mode,
    _push_mode,
)


@dataclass
class ThreadState:
    """Grad mode, autocast, hooks on saved tensors, modes, CUDA streams, random numbers."""

    grad_enabled: bool
    autocast: list[tuple[str, bool, torch.dtype]]
    autocast_cache: bool
    hooks: list[tuple[Any, Any]]
    dispatch_modes: list[Any]
    function_modes: list[Any]
    stream: torch.cuda.Stream | None
    random: list[tuple[torch.Generator, torch.Tensor]]

    @classmethod
    def take(cls, device: torch.device, generators: list[torch.Generator]) -> ThreadState:
        """Reads the state, and empties what is a stack."""
        hooks = []
        while (pair := torch._C._autograd._top_saved_tensors_default_hooks(True)) is not None:
            hooks.append(pair)
            torch._C._autograd._pop_saved_tensors_default_hooks()
        dispatch_modes = _get_current_dispatch_mode_stack()
        for _ in dispatch_modes:
            _pop_mode()
        function_modes = _get_current_function_mode_stack()
        for _ in function_modes:
            _pop_function_mode()
        return cls(
            torch.is_grad_enabled(),
            [
                (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
                for kind in {"cpu", device.type}
            ],
            torch.is_autocast_cache_enabled(),
            hooks,
            dispatch_modes,
            function_modes,
            torch.cuda.current_stream() if device.type == "cuda" else None,
            [(generator, generator.get_state()) for generator in generators],
        )

    def install(self) -> None:
        """Puts back what :meth:`take` took, once."""
        torch._C._set_grad_enabled(self.grad_enabled)
        for kind, enabled, dtype in self.autocast:
            torch.set_autocast_enabled(kind, enabled)
            torch.set_autocast_dtype(kind, dtype)
        torch.set_autocast_cache_enabled(self.autocast_cache)
        for pack, unpack in reversed(self.hooks):
            torch._C._autograd._push_saved_tensors_default_hooks(pack, unpack)
        for mode in self.dispatch_modes:
            _push_mode(mode)
        for mode in self.function_modes:
            _push_function_mode(mode)
        if self.stream is not None:
            torch.cuda.set_stream(self.stream)
        for generator, state in self.random:
            generator.set_state(state)


def why_not_suspendable() -> str | None:
    """What around the current code would be torn apart if it were suspended; None where nothing is."""
    if torch.is_inference_mode_enabled():
        return "under torch.inference_mode()"
    if torch._C._current_graph_task_id() != -1:
        return "inside a backward pass (of a reentrant checkpoint, or of torch.autograd.grad)"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "inside a torch.func transform"
    if torch.autograd.forward_ad._current_level >= 0:
        return "under forward-mode automatic differentiation"
    if torch._C._is_tracing():
        return "while torch.jit traces"
    if not torch._C._autograd._saved_tensors_hooks_is_enabled():  # type: ignore[attr-defined]
        return "where hooks on saved tensors are disabled"
    return None
