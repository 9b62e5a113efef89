"""With what a certificate was made: device, dtypes, versions, options."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Mapping
from typing import Any

import torch

from .copies import Copies


def computes_in(
    originals: Copies, device: torch.device, autocast: torch.dtype | torch.autocast | None
) -> set[torch.dtype]:
    """The dtypes of the trainable parameters, and of autocast where it is on."""
    dtypes = {parameter.dtype for parameter in originals.trainable.values()}
    if isinstance(autocast, torch.autocast):
        if autocast._enabled:
            dtypes.add(autocast.fast_dtype)
    elif autocast is not None:
        dtypes.add(autocast)
    elif torch.is_autocast_enabled(device.type):
        dtypes.add(torch.get_autocast_dtype(device.type))
    return dtypes


def device_for_double(device: torch.device) -> torch.device:
    """The device itself, or the CPU where it has no float64."""
    try:
        torch.zeros(1, dtype=torch.float64, device=device)
    except (TypeError, RuntimeError):
        return torch.device("cpu")
    return device


def describe(
    device: torch.device, dtypes: set[torch.dtype], seed: int, options: Mapping[str, Any]
) -> dict[str, str]:
    """As text, for people and for JSON."""
    # Imported here: the package imports verify before it is complete.
    from .. import __version__

    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "sbp_fast": __version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "device": _device_name(device),
        "dtype": " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes)),
        "seed": str(seed),
        "options": ", ".join(f"{name}={_short(value)}" for name, value in options.items()),
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return str(device)


def _short(value: Any) -> str:
    return getattr(value, "__name__", None) or repr(value)
