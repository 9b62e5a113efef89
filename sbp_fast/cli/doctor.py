"""``sbp-fast doctor``: what is built, what is usable, and for each thing missing why and what to do."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from .. import StreamedAccumulator, __version__
from ..ops import BACKENDS, BackendUnavailableError, availability, resolve
from ..ops.native import LIBRARIES, build_note, cpu_instruction_set, load_prefetch

# float32 arithmetic in another order: a few units in the last place of a short sum.
_AGREEMENT = 1e-6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    del parser  # the command takes none


def run(arguments: argparse.Namespace) -> int:
    """Prints the report. Exit status 1 where a backend that should work does not."""
    del arguments
    print(f"sbp_fast {__version__}")
    for name, text in _environment().items():
        print(f"  {name:<10} {text}")

    print("\nNative libraries")
    for name in LIBRARIES:
        print(f"  {name:<10} {_describe_library(name)}")

    print("\nBackends (one real step on each, against the reference)")
    checks = [_check(name) for name in BACKENDS if name != "auto"]
    for check in checks:
        print(f"  {check.backend:<10} {check.verdict:<9} {check.detail}")

    variable = os.environ.get("SBP_FAST_BACKEND")
    note = "" if variable is None else f" (SBP_FAST_BACKEND={variable} is set and replaces 'auto')"
    print(f"\nbackend='auto' takes, by device{note}")
    choices = {device: _automatic_choice(device) for device in ("cpu", "cuda")}
    for device, choice in choices.items():
        print(f"  {device:<10} {choice.backend or f'nothing: {choice.reason}'}")

    advice = _advice(checks)
    if not any(choice.backend for choice in choices.values()):
        advice.append(
            f"SBP_FAST_BACKEND={variable} FAILED: it serves no device here. Unset it, or set it to a "
            "backend that is ok."
        )
    hint = allocator_hint(os.environ) if torch.cuda.is_available() else None
    for sentence in (*advice, *([hint] if hint else [])):
        print(f"\n{sentence}")
    return 1 if advice else 0


@dataclass(frozen=True)
class _Check:
    backend: str
    verdict: str
    detail: str


@dataclass(frozen=True)
class _Choice:
    """What ``"auto"`` stands for on a device: a backend, or the reason why there is none."""

    backend: str = ""
    reason: str = ""


def _environment() -> dict[str, str]:
    cuda = torch.version.cuda
    facts = {
        "python": f"{platform.python_version()} on {platform.platform()}",
        "torch": f"{torch.__version__}, {f'CUDA {cuda}' if cuda else 'built without CUDA'}",
        "triton": _version("triton") or "not installed; pip install 'sbp_fast[triton]'",
        "threads": f"{torch.get_num_threads()} ({platform.machine()})",
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts["device"] = (
            f"{properties.name}, {properties.total_memory / 2**30:.1f} GiB, "
            f"compute capability {properties.major}.{properties.minor}"
        )
    else:
        facts["device"] = "cpu (torch sees no CUDA device)"
    return facts


# What becomes of micro-batches without it.
_WITHOUT = {
    "prefetch": "; the training thread gathers micro-batches, on the CPU when their turn comes"
}


def _describe_library(name: str) -> str:
    note = build_note()
    without = _WITHOUT.get(name, "")
    if name not in note["built"]:
        reason = note["left_out"].get(name, "unknown")
        return f"not built: {reason}{without}"
    built = f"built with {note['built'][name]}"
    usable, reason = load_prefetch() if name == "prefetch" else availability(name)
    if not usable:
        return f"{built}; not loaded: {reason}{without}"
    return f"{built}; uses {cpu_instruction_set()}" if name == "cpu" else f"{built}; loaded"


def _check(backend: str) -> _Check:
    usable, reason = availability(backend)
    if not usable:
        return _Check(backend, "missing", reason)
    device = _device_for(backend)
    try:
        expected = _one_step("reference", device)
        actual = _one_step(backend, device)
        difference = float((actual - expected).norm() / expected.norm())
    except Exception as error:  # whatever it is, this report is where it should be read
        reason = " ".join(str(error).split())
        return _Check(backend, "FAILED", f"on {device}, {type(error).__name__}: {reason}")
    verdict = "ok" if difference <= _AGREEMENT else "WRONG"
    detail = f"on {device}, relative difference {difference:.1e} (at most {_AGREEMENT:.0e})"
    return _Check(backend, verdict, detail)


def allocator_hint(environment: Mapping[str, str]) -> str | None:
    """What would keep CUDA memory from falling into pieces; None where it is set already.

    Micro-batches of several sizes (the last one, those after out-of-memory) leave blocks that fit no
    other.
    """
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    if any("expandable_segments:true" in environment.get(name, "").lower() for name in names):
        return None
    return (
        "CUDA memory: set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True before Python starts, and "
        "blocks of one size can serve another. result.reserved_bytes against result.peak_bytes shows how "
        "much is lost without."
    )


def _advice(checks: list[_Check]) -> list[str]:
    """What to do about the backends that do not work, a sentence or two on each kind."""
    cure = "set SBP_FAST_BACKEND=reference and report this output."
    advice = []
    for verdict, meaning in (
        ("WRONG", "the result differs from the reference"),
        ("FAILED", "the step ended in an error"),
    ):
        names = [check.backend for check in checks if check.verdict == verdict]
        if names:
            advice.append(f"{', '.join(names)}: {meaning}. Do not train with it; {cure}")
    return advice


def _device_for(backend: str) -> str:
    return "cuda" if backend != "cpu" and torch.cuda.is_available() else "cpu"


def _one_step(backend: str, device: str) -> torch.Tensor:
    """All parameters after one clipped step on an uneven split: shape ``(parameters,)``, float64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(33, 65), nn.GELU(), nn.Linear(65, 7))
        inputs, targets = torch.randn(13, 33), torch.randint(0, 7, (13,))
    model.to(device)
    accumulator = StreamedAccumulator(
        model,
        torch.optim.SGD(model.parameters(), lr=0.5),
        nn.CrossEntropyLoss(),
        micro_batch_size=5,
        max_grad_norm=0.1,
        backend=backend,
    )
    accumulator.step(inputs, targets)
    return torch.cat([parameter.detach().double().flatten() for parameter in model.parameters()])


def _automatic_choice(device: str) -> _Choice:
    if device == "cuda" and not torch.cuda.is_available():
        return _Choice(reason="torch sees no CUDA device")
    try:
        return _Choice(backend=resolve("auto", device))
    except (ValueError, BackendUnavailableError) as error:
        return _Choice(reason=str(error))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
