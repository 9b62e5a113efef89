"""The commands, and what `doctor` says of backends that are there, missing or wrong."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from sbp_fast.cli import doctor, main
from sbp_fast.ops import BACKENDS, availability, backends
from sbp_fast.ops.native import Availability


def test_doctor_judges_every_backend(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    section = printed[printed.index("Backends (one real step") :].splitlines()
    for name in BACKENDS[1:]:
        line = next(line for line in section if line.split()[:1] == [name])
        usable, reason = availability(name)
        if usable:
            assert line.split()[1] == "ok"
            assert "relative difference" in line
        else:
            assert line.split()[1] == "missing"
            assert reason in line


def test_doctor_finds_a_wrong_backend(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    one_step = doctor._one_step

    def slightly_wrong(backend: str, device: str) -> Tensor:
        parameters = one_step(backend, device)
        return parameters * 1.001 if backend == "cpu" else parameters

    if not availability("cpu").usable:
        pytest.skip(f"backend cpu: {availability('cpu').reason}")
    monkeypatch.setattr(doctor, "_one_step", slightly_wrong)
    assert main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert "WRONG" in printed
    assert "SBP_FAST_BACKEND=reference" in printed


def test_doctor_survives_a_backend_that_raises(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    one_step = doctor._one_step

    def raising(backend: str, device: str) -> Tensor:
        if backend == "cpu":
            raise RuntimeError("kernel launch failed:\nno image for this device")
        return one_step(backend, device)

    if not availability("cpu").usable:
        pytest.skip(f"backend cpu: {availability('cpu').reason}")
    monkeypatch.setattr(doctor, "_one_step", raising)
    assert main(["doctor"]) == 1
    lines = capsys.readouterr().out.splitlines()
    line = next(line for line in lines if line.split()[:2] == ["cpu", "FAILED"])
    assert "RuntimeError: kernel launch failed: no image for this device" in line
    assert any(line.split()[:2] == ["reference", "ok"] for line in lines)
    assert any(line.startswith("backend='auto' takes") for line in lines)
    assert any("SBP_FAST_BACKEND=reference" in line for line in lines)


@pytest.mark.parametrize(
    ("variable", "reason"),
    [
        ("nonsense", "backend is 'nonsense'; it must be one of auto"),
        ("cuda", "backend='cuda' computes on cuda tensors"),
        ("triton", "backend='triton' is not usable here"),
    ],
)
def test_doctor_survives_a_variable_that_names_no_usable_backend(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
    reason: str,
) -> None:
    def without_triton(backend: str) -> Availability:
        return Availability(False, "taken away") if backend == "triton" else availability(backend)

    monkeypatch.setenv("SBP_FAST_BACKEND", variable)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(backends, "availability", without_triton)
    monkeypatch.setattr(backends, "_resolve", backends._resolve.__wrapped__)
    assert main(["doctor"]) == 1
    printed = capsys.readouterr().out
    section = printed[printed.index("backend='auto' takes, by device") :]
    assert f"SBP_FAST_BACKEND={variable} is set" in section
    assert f"nothing: {reason}" in section
    assert f"SBP_FAST_BACKEND={variable} FAILED" in section
    assert re.search(r"^  reference +ok ", printed, re.MULTILINE)


def test_doctor_says_what_becomes_of_micro_batches_without_the_prefetcher(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    note = {"choice": "auto", "built": {"prefetch": "a compiler"}, "left_out": {}}
    monkeypatch.setattr(doctor, "build_note", lambda: note)
    monkeypatch.setattr(doctor, "load_prefetch", lambda: Availability(False, "taken away"))
    assert main(["doctor"]) == 0
    line = "prefetch   built with a compiler; not loaded: taken away; the training thread gathers"
    assert line in capsys.readouterr().out


def test_doctor_says_that_the_variable_replaces_auto(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SBP_FAST_BACKEND", "reference")
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert "by device (SBP_FAST_BACKEND=reference is set and replaces 'auto')" in printed


def test_commands_run_as_a_module() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "sbp_fast", "--help"], capture_output=True, text=True, check=True
    )
    for command in ("doctor", "plan", "demo", "verify", "bench"):
        assert command in run.stdout


def test_unknown_command_is_named() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "sbp_fast", "paln"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 2
    assert "paln" in run.stderr


def test_importing_the_package_loads_no_heavy_extras() -> None:
    heavy = "[m for m in ('matplotlib', 'tqdm', 'triton', 'torch._dynamo') if m in sys.modules]"
    code = f"import sys, sbp_fast; print({heavy})"
    bare = f"import sys, torch; print({heavy})"
    with_package = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    with_torch = subprocess.run([sys.executable, "-c", bare], capture_output=True, text=True)
    assert with_package.stdout == with_torch.stdout, with_package.stderr


@pytest.mark.parametrize(
    ("environment", "hint"),
    [
        ({}, True),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, True),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64,expandable_segments:True"}, False),
        ({"PYTORCH_ALLOC_CONF": "expandable_segments:true"}, False),
    ],
)
def test_doctor_on_fragmentation(environment: dict[str, str], hint: bool) -> None:
    sentence = doctor.allocator_hint(environment)
    assert (sentence is not None and "expandable_segments:True" in sentence) == hint
