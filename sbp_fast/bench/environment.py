"""Where and with what a measurement was made."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import __version__
from ..ops import BACKENDS, availability, native

_SOURCE = Path(__file__).resolve().parents[2]


def device_name(device: torch.device) -> str:
    """The processor or GPU in its maker's words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return _processor()


def slug(device: torch.device) -> str:
    """A name for a folder of results, such as ``cpu-amd-epyc-avx512-2-threads``.

    Virtual machines call processors of several generations by one name; their instruction sets differ.
    """
    name = f"{device.type} {device_name(device)}"
    if device.type != "cuda":
        name += f" {torch.backends.cpu.get_cpu_capability()} {torch.get_num_threads()} threads"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


@cache
def revision() -> str:
    """The source's git revision, marked ``-dirty`` where files differ from it; empty if not known."""
    if not (_SOURCE / ".git").exists():
        return ""
    command = ["git", "-C", str(_SOURCE), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def load_average() -> float:
    """Processes that ran or wanted to, over the last minute; 0 where the system does not say."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def describe(device: torch.device) -> dict[str, Any]:
    """What could explain a figure: hardware, versions, what was built and by which compiler."""
    description: dict[str, Any] = {
        "date": now(),
        "revision": revision(),
        "sbp_fast": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average_1_minute": round(load_average(), 2),
        "build": native.build_note(),
        "backends": {
            name: "usable" if usable.usable else usable.reason
            for name, usable in ((name, availability(name)) for name in BACKENDS[1:])
        },
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
    if availability("cpu").usable:
        description["instruction_set"] = native.cpu_instruction_set()
    if device.type == "cuda":
        description["gpu"] = _gpu(device)
    return description


def write(path: Path, device: torch.device) -> None:
    path.write_text(json.dumps(describe(device), indent=2) + "\n")


def _gpu(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "cuda": torch.version.cuda,
        "driver": _driver(),
    }


def _driver() -> str | None:
    path = Path("/proc/driver/nvidia/version")
    if not path.exists():
        return None
    version = re.search(r"\b\d+\.\d+(\.\d+)?\b", path.read_text())
    return version.group() if version else None


@cache
def _processor() -> str:
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
