"""Which calls of ``functional.linear``, ``conv1d`` and ``conv2d`` a step may compute in its own way.

All of torch's own modules go through these functions. A model that imported one by name, compiled code
and scripted code call torch itself, and are left alone; so are functions that somebody else has replaced.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional
from torch.utils._device import DeviceContext

Function = Callable[..., Any]
_NAMES = ("linear", "conv1d", "conv2d")
_TORCH: dict[str, Function] = {
    "linear": torch._C._nn.linear,
    "conv1d": torch.conv1d,
    "conv2d": torch.conv2d,
}


class Taker(Protocol):
    """Computes calls in place of torch; what it returns must be the same, its gradient included."""

    def linear(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None: ...

    def pointwise(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None: ...


# By the weight's id; whoever installs them keeps the weights.
_takers: dict[int, Taker] = {}
_lock = threading.Lock()


@contextmanager
def taking(takers: Mapping[int, Taker]) -> Iterator[None]:
    """While inside, calls with these weights, given by their id, are offered to their takers first."""
    if not takers:
        yield
        return
    with _lock:
        before = {key: _takers[key] for key in takers if key in _takers}
        _takers.update(takers)
        _install()
    try:
        yield
    finally:
        with _lock:
            for key in takers:
                _takers.pop(key, None)
            _takers.update(before)
            _install()


def _install() -> None:
    for name in _NAMES:
        expected, wanted = _TORCH[name], _OFFERING[name]
        if not _takers:
            expected, wanted = wanted, expected
        # Else it is somebody else's, and not ours to replace.
        if getattr(functional, name) is expected:
            setattr(functional, name, wanted)


def is_plain(input: Any, weight: Tensor, bias: Any) -> bool:
    """Whether nobody else has a part in the call: no transform, mode or subclass of tensors."""
    return (
        torch.is_grad_enabled()
        and _is_plain_tensor(input)
        and _is_plain_tensor(weight)
        and (bias is None or _is_plain_tensor(bias))
        and input.layout is torch.strided
        and input.device == weight.device
        and torch._C._functorch.peek_interpreter_stack() is None
        and forward_ad._current_level < 0
        and torch._C._get_tracing_state() is None
        and _function_modes_are_default_devices()
    )


def _is_plain_tensor(value: Any) -> bool:
    kind = type(value)
    return kind is Tensor or (
        isinstance(value, Tensor)
        and kind.__torch_function__ is torch._C._disabled_torch_function_impl
    )


def _function_modes_are_default_devices() -> bool:
    if not torch._C._len_torch_function_stack():
        return True
    modes = torch.overrides._get_current_function_mode_stack()
    return all(isinstance(mode, DeviceContext) for mode in modes)


def _linear(input: Any, weight: Any, bias: Any = None) -> Any:
    # Compiled code sees the call below alone.
    if not torch.compiler.is_compiling():
        taker = _takers.get(id(weight))
        if taker is not None and is_plain(input, weight, bias):
            output = taker.linear(input, weight, bias)
            if output is not None:
                return output
    return _TORCH["linear"](input, weight, bias)


def _convolution(name: str) -> Function:
    native = _TORCH[name]

    def call(input: Any, weight: Any, bias: Any = None, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            taker = _takers.get(id(weight))
            if (
                taker is not None
                and _moves_pixel_by_pixel(*args, **kwargs)
                and is_plain(input, weight, bias)
            ):
                output = taker.pointwise(input, weight, bias)
                if output is not None:
                    return output
        return native(input, weight, bias, *args, **kwargs)

    return functools.wraps(native)(call)


def _moves_pixel_by_pixel(
    stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: Any = 1
) -> bool:
    return _all_are(stride, 1) and _all_are(padding, 0) and groups == 1


def _all_are(value: Any, expected: int) -> bool:
    values = value if isinstance(value, (tuple, list)) else (value,)
    return all(one == expected for one in values)


_OFFERING: dict[str, Function] = {
    "linear": functools.wraps(_TORCH["linear"])(_linear),
    "conv1d": _convolution("conv1d"),
    "conv2d": _convolution("conv2d"),
}
