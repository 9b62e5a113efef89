"""The CPU kernels of batch norm under the address and undefined behaviour sanitizers, one instruction set
at a time, on buffers that end where their elements end. And the proof that these would notice: sources
with one mistake put in are caught.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import cuda_source
import pytest
import torch

import build_native

SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
PROGRAM = Path("cpu", "checks", "check_batch_norm.cpp")


class Mistake(NamedTuple):
    """An edit of one source, and what the program's report must say."""

    source: str
    right: str
    wrong: str
    report: str


MISTAKES = {
    "a vector past the end of a run": Mistake(
        "batch_norm_sums.h",
        "i + 2 * kPairLanes <= end",
        "i + kPairLanes <= end",
        "heap-buffer-overflow",
    ),
    "no room for the last vector of expanded columns": Mistake(
        "expand.h", "kGroupColumns + kVectorBytes / sizeof(T)", "kGroupColumns", "overflow"
    ),
    "elements counted twice": Mistake(
        "batch_norm_sums.h", "end - i));", "kPairLanes));", "mean: element"
    ),
}


def command(csrc: Path, program: Path, instruction_set: str) -> list[str]:
    flags = build_native.INSTRUCTION_SETS[instruction_set]
    return cuda_source.for_cpu(csrc / PROGRAM, program, ["-O0", *flags, *SANITIZERS])


def run(program: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program], capture_output=True, text=True)


def instruction_sets_here() -> tuple[str, ...]:
    names = tuple(build_native.INSTRUCTION_SETS)
    capability = torch.backends.cpu.get_cpu_capability().lower()
    return names[: names.index(capability) + 1] if capability in names else names[:1]


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By instruction set, or by the mistake that is in it."""
    folder = tmp_path_factory.mktemp("programs")
    programs, commands = {}, []

    def add(name: str, csrc: Path, instruction_set: str) -> None:
        programs[name] = folder / name.replace(" ", "_")
        commands.append(command(csrc, programs[name], instruction_set))

    for instruction_set in instruction_sets_here():
        add(instruction_set, cuda_source.CSRC, instruction_set)
    for title, mistake in MISTAKES.items():
        csrc = tmp_path_factory.mktemp("mistaken") / "csrc"
        shutil.copytree(cuda_source.CSRC, csrc)
        source = csrc / "cpu" / mistake.source
        text = source.read_text()
        assert text.count(mistake.right) == 1, f"{mistake.source} no longer says {mistake.right!r}"
        source.write_text(text.replace(mistake.right, mistake.wrong))
        add(title, csrc, "baseline")
    cuda_source.run_all(commands)
    return programs


@pytest.mark.parametrize("instruction_set", build_native.INSTRUCTION_SETS)
def test_memory_and_values(programs: dict[str, Path], instruction_set: str) -> None:
    if instruction_set not in programs:
        pytest.skip(f"this processor has no {instruction_set}")
    outcome = run(programs[instruction_set])
    assert outcome.returncode == 0, outcome.stderr


@pytest.mark.parametrize("title", MISTAKES)
def test_mistakes_are_caught(programs: dict[str, Path], title: str) -> None:
    outcome = run(programs[title])
    assert outcome.returncode != 0
    assert MISTAKES[title].report in outcome.stderr
