"""What every test stands on: seeds, threads, and the backends by name."""

from __future__ import annotations

import importlib.util
import os
import random

# Tests compute little at a time. Threads that spin while they wait for more would take the cores from
# one another: on a busy machine the tests then take six times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads this once, when it is imported. Without a CUDA device its kernels can only be
    # interpreted; with one, tests/gpu runs them compiled.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from sbp_fast.ops import availability

THREADS = 2
BACKENDS_ON_CPU = ("cpu", "triton", "reference")

# tests/gpu needs no hypothesis: it also runs on machines where nothing can be installed.
if importlib.util.find_spec("hypothesis") is not None:
    import hypothesis

    # Derandomized: a failure in CI is the failure anyone sees. No deadline: machines differ.
    hypothesis.settings.register_profile(
        "deterministic", deadline=None, derandomize=True, database=None
    )
    hypothesis.settings.load_profile("deterministic")


def pytest_configure() -> None:
    torch.set_num_threads(THREADS)


@pytest.fixture(autouse=True)
def _seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def why_not_on_cpu(backend: str) -> str:
    """Why a backend cannot compute on CPU tensors in this process; empty where it can."""
    usable, reason = availability(backend)
    if not usable:
        return reason
    if backend == "triton" and os.environ.get("TRITON_INTERPRET", "0") in ("", "0"):
        return "compiled Triton kernels take no CPU tensors; tests/gpu runs them"
    return ""


@pytest.fixture(params=["autograd", "kernels"])
def adding(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways in which gradients add up under backend="auto" on the CPU: where nothing is chosen,
    autograd adds those whose dtype allows it; where the environment chooses, kernels add all."""
    if request.param == "kernels":
        usable = not why_not_on_cpu("cpu")
        monkeypatch.setenv("SBP_FAST_BACKEND", "cpu" if usable else "reference")


@pytest.fixture(params=BACKENDS_ON_CPU)
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend that can compute on CPU tensors; the others are skipped with their reason."""
    name = str(request.param)
    reason = why_not_on_cpu(name)
    if reason:
        pytest.skip(f"backend {name}: {reason}")
    return name
