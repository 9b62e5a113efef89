"""Which implementation serves a call: an explicit choice never falls back, ``"auto"`` does.

The environment variable ``SBP_FAST_BACKEND`` replaces ``"auto"`` (and nothing else).
"""

from __future__ import annotations

import os
from functools import cache

import torch

# Imported for what they register: the ops and their reference overloads.
from . import reference, reference_batch_norm, reference_dropout, schemas  # noqa: F401
from .native import Availability, load_cpu, load_cuda

BACKENDS = ("auto", "cuda", "triton", "cpu", "reference")

_OVERLOAD = {"cuda": "default", "cpu": "default", "triton": "triton", "reference": "reference"}

# What "auto" tries, best first, by the device's type.
_PREFERENCE = {
    "cpu": ("cpu", "reference"),
    "cuda": ("cuda", "triton", "reference"),
    "xpu": ("triton", "reference"),
}
_PREFERENCE_ELSEWHERE = ("reference",)

# What an explicit backend can compute on.
_DEVICES = {"cuda": ("cuda",), "cpu": ("cpu",), "triton": ("cuda", "xpu", "cpu"), "reference": ()}


class BackendUnavailableError(RuntimeError):
    """The backend asked for cannot be used here. The message says why and what to do."""


@cache
def availability(backend: str) -> Availability:
    """Whether ``backend`` is usable in this process, with the reason where it is not."""
    if backend == "cpu":
        return load_cpu()
    if backend == "cuda":
        return load_cuda()
    if backend == "triton":
        # The last two for what they register.
        from . import triton_backend, triton_batch_norm, triton_dropout  # noqa: F401

        return Availability(*triton_backend.is_available())
    return Availability(True, "")


def requested(backend: str) -> str:
    """What the caller asks for or, failing that, the environment."""
    return os.environ.get("SBP_FAST_BACKEND", "auto") if backend == "auto" else backend


def is_automatic(backend: str) -> bool:
    """Whether nobody has chosen: neither the caller nor the environment."""
    return requested(backend) == "auto"


def resolve(backend: str, device_type: str) -> str:
    """The backend that serves tensors on ``device_type``: never ``"auto"``.

    Raises:
        ValueError: ``backend`` is no known name, or does not compute on this device.
        BackendUnavailableError: the backend named cannot be used here.
    """
    return _resolve(requested(backend), device_type)


@cache
def _resolve(backend: str, device_type: str) -> str:
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; it must be one of {', '.join(BACKENDS)}")
    if backend == "auto":
        candidates = _PREFERENCE.get(device_type, _PREFERENCE_ELSEWHERE)
        return next(name for name in candidates if availability(name).usable)
    devices = _DEVICES[backend]
    if devices and device_type not in devices:
        raise ValueError(
            f"backend={backend!r} computes on {' and '.join(devices)} tensors, these are on "
            f"{device_type}; pass backend='auto' or move the tensors"
        )
    usable, reason = availability(backend)
    if not usable:
        raise BackendUnavailableError(
            f"backend={backend!r} is not usable here: {reason}. backend='auto' takes the best that is"
        )
    return backend


def operator(name: str, backend: str, device_type: str) -> torch._ops.OpOverload:
    """The op ``sbp_fast::name`` in the overload that implements ``backend``.

    Raises:
        ValueError, BackendUnavailableError: as :func:`resolve`.
    """
    overload: torch._ops.OpOverload = getattr(
        getattr(torch.ops.sbp_fast, name), _overload_name(requested(backend), device_type)
    )
    return overload


def _overload_name(backend: str, device_type: str) -> str:
    return _OVERLOAD[_resolve(backend, device_type)]


# What torch.compiler.assume_constant_result sets; but that imports the compiler, and takes seconds.
_overload_name._dynamo_marked_constant = True  # type: ignore[attr-defined]
