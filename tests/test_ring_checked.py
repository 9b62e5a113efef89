"""The prefetcher's ring under the address, undefined behaviour and thread sanitizers. And the proof that
these, and a stream that is late every time, would notice: sources with one mistake put in are caught.
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
PROGRAM = Path("prefetch", "checks", "check_ring.cpp")


class Mistake(NamedTuple):
    """An edit of one source, and what the program's report must say."""

    source: str
    right: str
    wrong: str
    flags: tuple[str, ...]
    report: str


MISTAKES = {
    "copies do not wait until device memory is consumed": Mistake(
        "ring.h",
        "engine_->wait_for_consumed(slot);",
        "",
        (),
        "rows of another micro-batch",
    ),
    "computation does not wait for copies": Mistake(
        "ring.h",
        "if (engine_ != nullptr) engine_->wait_for_copied(slot, main);",
        "",
        (),
        "rows of another micro-batch",
    ),
    "host memory is filled again before it is copied": Mistake(
        "ring.h",
        "engine_->wait_on_host(slot);\n    engine_->wait_for_consumed",
        "engine_->wait_for_consumed",
        (),
        "rows of another micro-batch",
    ),
    "consumed before the last computation": Mistake(
        "ring.h",
        "if (engine_ != nullptr) engine_->mark_consumed(slot, main);",
        "",
        (),
        "rows of another micro-batch",
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
}


def command(csrc: Path, program: Path, flags: tuple[str, ...]) -> list[str]:
    return cuda_source.for_cpu(csrc / PROGRAM, program, ["-pthread", *flags])


def run(program: Path) -> subprocess.CompletedProcess[str]:
    # A ring that waits for ever: the limit turns that into a failure.
    environment = os.environ | {"TSAN_OPTIONS": "halt_on_error=1"}
    return subprocess.run([program], env=environment, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By sanitizer, or by the mistake that is in it."""
    folder = tmp_path_factory.mktemp("programs")
    programs, commands = {}, []

    def add(name: str, csrc: Path, flags: tuple[str, ...]) -> None:
        programs[name] = folder / name.replace(" ", "_")
        commands.append(command(csrc, programs[name], flags))

    add("memory", cuda_source.CSRC, MEMORY)
    add("races", cuda_source.CSRC, RACES)
    for title, mistake in MISTAKES.items():
        csrc = tmp_path_factory.mktemp("mistaken") / "csrc"
        shutil.copytree(cuda_source.CSRC / "prefetch", csrc / "prefetch")
        source = csrc / "prefetch" / mistake.source
        text = source.read_text()
        assert text.count(mistake.right) == 1, f"{mistake.source} no longer says {mistake.right!r}"
        source.write_text(text.replace(mistake.right, mistake.wrong))
        # An argument that a mistake leaves unused is no finding.
        add(title, csrc, (*mistake.flags, "-Wno-unused-parameter"))
    cuda_source.run_all(commands)
    return programs


@pytest.mark.parametrize("sanitizer", ["memory", "races"])
def test_orders_values_errors_and_ends(programs: dict[str, Path], sanitizer: str) -> None:
    outcome = run(programs[sanitizer])
    assert outcome.returncode == 0, outcome.stderr


@pytest.mark.parametrize("title", MISTAKES)
def test_mistakes_are_caught(programs: dict[str, Path], title: str) -> None:
    outcome = run(programs[title])
    assert outcome.returncode != 0
    assert MISTAKES[title].report in outcome.stderr
