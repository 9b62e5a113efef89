"""Finds and loads the native libraries, and says why where one is not usable."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import sysconfig
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

from . import schemas  # noqa: F401  (the ops must exist before a library adds its kernels)

FOLDER = Path(__file__).resolve().parent.parent / "_native"

LIBRARIES = ("cpu", "cuda", "prefetch")

# As csrc/cpu/dispatch.cpp knows them.
INSTRUCTION_SETS = ("baseline", "avx2", "avx512")


class Availability(NamedTuple):
    """Whether a backend can be used, and if not, why and what to do about it."""

    usable: bool
    reason: str


@cache
def build_note() -> dict[str, Any]:
    """What the build recorded: ``choice``, ``built`` (library -> compiler), ``left_out`` (-> reason)."""
    path = FOLDER / "build.json"
    if not path.exists():
        reason = "the package runs from a source tree that was never built; run `pip install .`"
        return {"choice": "never built", "built": {}, "left_out": dict.fromkeys(LIBRARIES, reason)}
    note: dict[str, Any] = json.loads(path.read_text())
    return note


@cache
def load_cpu() -> Availability:
    """Raises ValueError where SBP_FAST_CPU_CAPABILITY is none of the library's instruction sets."""
    # For a name that it does not know the library would take its baseline, and nobody notice.
    capability = os.environ.get("SBP_FAST_CPU_CAPABILITY")
    if capability is not None and capability not in INSTRUCTION_SETS:
        raise ValueError(
            f"SBP_FAST_CPU_CAPABILITY is {capability!r}; it must be one of "
            f"{', '.join(INSTRUCTION_SETS)}, or unset"
        )
    return _load("cpu")


@cache
def load_cuda() -> Availability:
    # The library's symbols come from torch's CUDA build and resolve only where there is one.
    if torch.version.cuda is None:
        return Availability(
            False,
            f"torch {torch.__version__} is built without CUDA; install a CUDA build of torch",
        )
    if not torch.cuda.is_available():
        return Availability(
            False, "torch sees no CUDA device; check `nvidia-smi` and CUDA_VISIBLE_DEVICES"
        )
    loaded = _load("cuda")
    if not loaded.usable:
        return loaded
    problem = _cuda_problem()
    if problem is not None:
        return Availability(
            False,
            f"the cuda library loads, but its kernels do not run here: {problem}. It was built with "
            f"{build_note()['built']['cuda']}; use a device of compute capability 8.0 or newer, and "
            "update the driver or build with a CUDA toolkit no newer than `nvidia-smi` shows",
        )
    return loaded


@cache
def load_prefetch() -> Availability:
    """Whether micro-batches can be prepared by a thread without the GIL."""
    problem = _not_built("prefetch")
    if problem is not None:
        return problem
    try:
        prefetch_module()
    except ImportError as error:
        return Availability(
            False, f"the prefetch module does not load: {error}; install the package again"
        )
    return Availability(True, "")


@cache
def prefetch_module() -> ModuleType:
    """The module of csrc/prefetch.

    Raises:
        ImportError: there is none for this Python.
    """
    path = FOLDER / f"prefetch{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not path.exists():
        raise ImportError(f"{path} is missing, as it was built by another Python")
    spec = importlib.util.spec_from_file_location("sbp_fast._native.prefetch", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cuda_engine() -> int:
    """The address of the CUDA library's function that makes the prefetcher's engine."""
    function = ctypes.CDLL(str(FOLDER / "libsbp_fast_cuda.so")).sbp_fast_copy_engine
    address = ctypes.cast(function, ctypes.c_void_p).value
    assert address is not None
    return address


def cpu_instruction_set() -> str:
    """``"avx512"``, ``"avx2"`` or ``"baseline"``: what the CPU library chose at run time."""
    library = ctypes.CDLL(str(FOLDER / "libsbp_fast_cpu.so"))
    function = library.sbp_fast_cpu_instruction_set
    function.restype = ctypes.c_char_p
    name: bytes = function()
    return name.decode()


def _cuda_problem() -> str | None:
    """What CUDA says when it is asked for one of the library's kernels; None where all is well."""
    function = ctypes.CDLL(str(FOLDER / "libsbp_fast_cuda.so")).sbp_fast_cuda_probe
    function.restype = ctypes.c_char_p
    text: bytes | None = function()
    return None if text is None else text.decode()


def _not_built(name: str) -> Availability | None:
    note = build_note()
    # The note decides, not the file: what the last build did not make is older than the package.
    if name in note["built"]:
        return None
    reason = note["left_out"].get(name, "unknown")
    kind = "module" if name == "prefetch" else "library"
    return Availability(False, f"the {name} {kind} was not built: {reason}")


def _load(name: str) -> Availability:
    problem = _not_built(name)
    if problem is not None:
        return problem
    path = FOLDER / f"libsbp_fast_{name}.so"
    if not path.exists():
        return Availability(False, f"{path} is missing; install the package again")
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return Availability(
            False,
            f"{path.name} does not load with torch {torch.__version__}: {error}; "
            "reinstall sbp_fast with --no-build-isolation",
        )
    return Availability(True, "")
