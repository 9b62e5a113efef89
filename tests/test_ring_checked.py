"""The prefetcher's ring, and its CUDA engine on a stand-in for CUDA's runtime, under the address,
undefined behaviour and thread sanitizers. And the proof that these, and a stream that is late every
time, would notice: sources with one mistake put in are caught.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import cuda_source
import pytest

MEMORY = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
RACES = ("-fsanitize=thread",)

CHECKS = Path("prefetch", "checks")
RING, CUDA_ENGINE = "check_ring.cpp", "check_cuda_engine.cpp"
PROGRAMS = {"memory": (RING, MEMORY), "races": (RING, RACES), "engine": (CUDA_ENGINE, MEMORY)}
OTHER_ROWS = "rows of another micro-batch"


class Mistake(NamedTuple):
    """An edit of one source, and what the report of the program that runs it must say."""

    source: str
    right: str
    wrong: str
    flags: tuple[str, ...]
    report: str
    program: str = RING


MISTAKES = {
    "copies do not wait until device memory is consumed": Mistake(
        "ring.h",
        "engine_->wait_for_consumed(slot);",
        "",
        (),
        OTHER_ROWS,
    ),
    "computation does not wait for copies": Mistake(
        "ring.h",
        "if (engine_ != nullptr) engine_->wait_for_copied(slot, main);",
        "",
        (),
        OTHER_ROWS,
    ),
    "host memory is filled again before it is copied": Mistake(
        "ring.h",
        "engine_->wait_on_host(slot);\n    engine_->wait_for_consumed",
        "engine_->wait_for_consumed",
        (),
        OTHER_ROWS,
    ),
    "consumed before the last computation": Mistake(
        "ring.h",
        "if (engine_ != nullptr) engine_->mark_consumed(slot, main);",
        "",
        (),
        OTHER_ROWS,
    ),
    "a job queued without the lock": Mistake(
        "ring.h",
        "std::lock_guard lock(shared_->mutex);\n      shared_->slots[slot].state = State::kFilling;",
        "shared_->slots[slot].state = State::kFilling;",
        RACES,
        "data race",
    ),
    "an end that does not wait for copies": Mistake(
        "ring.h",
        "engine_->wait_on_host(slot);\n        } catch",
        "} catch",
        MEMORY,
        "heap-use-after-free",
    ),
    "rows outside of the source": Mistake(
        "gather.h", "row < 0 || row >= rows.length", "false", MEMORY, "heap-buffer-overflow"
    ),
    "CUDA: copies wait for copies": Mistake(
        *("cuda_engine.cu", "cudaStreamWaitEvent(side_, consumed_[slot], 0)"),
        "cudaStreamWaitEvent(side_, copied_[slot], 0)",
        *((), OTHER_ROWS, CUDA_ENGINE),
    ),
    "CUDA: consumed is marked on the side stream": Mistake(
        *("cuda_engine.cu", "cudaEventRecord(consumed_[slot], stream(main))"),
        "cudaEventRecord(consumed_[slot], side_)",
        *((), OTHER_ROWS, CUDA_ENGINE),
    ),
    "CUDA: computation waits for computation": Mistake(
        *("cuda_engine.cu", "cudaStreamWaitEvent(stream(main), copied_[slot], 0)"),
        "cudaStreamWaitEvent(stream(main), consumed_[slot], 0)",
        *((), OTHER_ROWS, CUDA_ENGINE),
    ),
    "CUDA: the host waits for nothing": Mistake(
        *("cuda_engine.cu", 'check(cudaEventSynchronize(copied_[slot]), "cudaEventSynchronize")'),
        "(void)slot",
        *((), OTHER_ROWS, CUDA_ENGINE),
    ),
    "CUDA: copies on the main stream": Mistake(
        *("cuda_engine.cu", "cudaMemcpyHostToDevice, side_)", "cudaMemcpyHostToDevice, nullptr)"),
        *((), OTHER_ROWS, CUDA_ENGINE),
    ),
}


def command(csrc: Path, source: str, program: Path, flags: tuple[str, ...]) -> list[str]:
    runtime = ["-I", str(csrc / CHECKS / "runtime")] if source == CUDA_ENGINE else []
    return cuda_source.for_cpu(csrc / CHECKS / source, program, ["-pthread", *runtime, *flags])


def run(program: Path) -> subprocess.CompletedProcess[str]:
    # A ring that waits for ever: the limit turns that into a failure.
    environment = os.environ | {"TSAN_OPTIONS": "halt_on_error=1"}
    return subprocess.run([program], env=environment, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By sanitizer, or by the mistake that is in it."""
    folder = tmp_path_factory.mktemp("programs")
    programs, commands = {}, []

    def add(name: str, csrc: Path, source: str, flags: tuple[str, ...]) -> None:
        programs[name] = folder / name.replace(" ", "_")
        commands.append(command(csrc, source, programs[name], flags))

    for name, (source, flags) in PROGRAMS.items():
        add(name, cuda_source.CSRC, source, flags)
    for title, mistake in MISTAKES.items():
        csrc = tmp_path_factory.mktemp("mistaken") / "csrc"
        shutil.copytree(cuda_source.CSRC / "prefetch", csrc / "prefetch")
        edited = csrc / "prefetch" / mistake.source
        text = edited.read_text()
        assert text.count(mistake.right) == 1, f"{mistake.source} no longer says {mistake.right!r}"
        edited.write_text(text.replace(mistake.right, mistake.wrong))
        # An argument that a mistake leaves unused is no finding.
        add(title, csrc, mistake.program, (*mistake.flags, "-Wno-unused-parameter"))
    cuda_source.run_all(commands)
    return programs


@pytest.mark.parametrize("name", PROGRAMS)
def test_orders_values_errors_and_ends(programs: dict[str, Path], name: str) -> None:
    outcome = run(programs[name])
    assert outcome.returncode == 0, outcome.stderr


@pytest.mark.parametrize("title", MISTAKES)
def test_mistakes_are_caught(programs: dict[str, Path], title: str) -> None:
    outcome = run(programs[title])
    assert outcome.returncode != 0
    assert MISTAKES[title].report in outcome.stderr
