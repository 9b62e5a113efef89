"""What a block was given, for the second time: as it was when it was called for the first."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def as_now(value: Any) -> Any:
    """A copy of the objects and containers that a block may change, down to tensors, which stay the same.

    A cache of keys and values, say: a block adds its own to what earlier ones have left there, and must
    not find them already there when it is computed again. Objects that are not written in Python, and
    modules, are handed on as they are.
    """
    return _copy(value, {})


def _copy(value: Any, copies: dict[int, Any]) -> Any:
    if id(value) in copies:
        return copies[id(value)]
    if isinstance(value, (Tensor, nn.Module, type)) or callable(value):
        return value
    kind = type(value)
    if kind is list:
        values: list[Any] = []
        copies[id(value)] = values
        values.extend(_copy(item, copies) for item in value)
        return values
    if kind is dict:
        items: dict[Any, Any] = {}
        copies[id(value)] = items
        items.update((key, _copy(item, copies)) for key, item in value.items())
        return items
    if kind is tuple:
        return tuple(_copy(item, copies) for item in value)
    is_plain: bool = kind.__new__ is object.__new__  # type: ignore[comparison-overlap]
    if is_plain and hasattr(value, "__dict__"):
        new = object.__new__(kind)
        copies[id(value)] = new
        vars(new).update((name, _copy(item, copies)) for name, item in vars(value).items())
        return new
    return value
