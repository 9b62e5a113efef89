"""How native sources are compiled by the tests: CUDA for devices with nvcc and for the host with g++, and
programs that check the CPU kernels."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

CSRC = Path(__file__).resolve().parent.parent / "csrc"
SOURCES = sorted((CSRC / "cuda").glob("*.cu"))
CAPABILITIES = (80, 90, 100)

_TORCH = Path(torch.__file__).parent
_COMMON = ["-std=c++20", "-isystem", str(_TORCH / "include")]
_STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"
_WARNINGS = ("-g1", "-Wall", "-Wextra", "-Werror", "-Wno-psabi")


def tool(name: str, folders: Sequence[str] = (), package: str = "") -> str:
    """The path of a program, or a skip that says what is missing."""
    path = shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), *folders]))
    if path is None:
        pytest.skip(f"{name} was not found{package and f'; it comes with {package}'}")
    return path


def nvcc() -> str:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return tool("nvcc", [f"{home}/bin"], "the CUDA toolkit")


def gxx() -> str:
    return tool("g++", package="Debian's g++")


def for_device(source: Path, target: Path, capability: int) -> list[str]:
    """Compiles to the machine code of one architecture; ptxas says what every kernel uses."""
    flags = ["-O3", "-DUSE_CUDA", _STABLE_ABI, "-Xptxas=-v", f"-arch=sm_{capability}", "-cubin"]
    return [nvcc(), *_COMMON, *flags, str(source), "-o", str(target)]


def for_host(source: Path, target: Path, flags: Sequence[str]) -> list[str]:
    """Compiles a source that uses the kernels, with the emulation in CUDA's place."""
    emulation = source.parent.parent / "emulation" / "cuda_emulation.h"
    language = ["-x", "c++"] if source.suffix == ".cu" else []
    return [
        *(gxx(), *_COMMON, _STABLE_ABI, "-include", str(emulation)),
        *(*_WARNINGS, *flags),
        *(*language, str(source), "-o", str(target)),
    ]


def for_cpu(source: Path, target: Path, flags: Sequence[str]) -> list[str]:
    """Compiles a program that uses the CPU kernels."""
    return [gxx(), *_COMMON, _STABLE_ABI, *_WARNINGS, *flags, str(source), "-o", str(target)]


def library_of(objects: Sequence[Path], target: Path) -> list[str]:
    libraries = [f"-L{_TORCH / 'lib'}", "-ltorch_cpu", "-lc10"]
    return [gxx(), "-shared", *map(str, objects), *libraries, "-o", str(target)]


def run_all(commands: Sequence[Sequence[str]]) -> list[subprocess.CompletedProcess[str]]:
    """Runs commands side by side; none may fail."""

    def run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, capture_output=True, text=True)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        outcomes = list(pool.map(run, commands))
    for outcome in outcomes:
        assert outcome.returncode == 0, f"{outcome.args}\n{outcome.stderr[-4000:]}"
    return outcomes
