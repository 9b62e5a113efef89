"""The CUDA kernels' own source on the host: a block's threads are real threads, under the address,
undefined behaviour and thread sanitizers. And the proof that these would notice: sources with one
mistake put in are caught.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import cuda_source
import pytest

PROGRAMS = ("accumulate", "statistics", "finalise", "batch_norm", "addressing", "dropout")
# Those whose threads share memory.
SHARING = ("statistics", "batch_norm")
MEMORY = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
RACES = ("-fsanitize=thread",)


class Mistake(NamedTuple):
    """An edit of one source, the program that runs it, and what its report must say."""

    source: str
    right: str
    wrong: str
    program: str
    flags: tuple[str, ...]
    report: str


MISTAKES = {
    "one vector too many": Mistake(
        "walk.cuh",
        "const int vectors = (end - begin) / kWidth;",
        "const int vectors = (end - begin) / kWidth + 1;",
        "statistics",
        MEMORY,
        "heap-buffer-overflow",
    ),
    "wide accesses whatever the alignment": Mistake(
        "walk.cuh",
        "is_aligned(chunk.written) && is_aligned(chunk.read)",
        "true",
        "statistics",
        MEMORY,
        "misaligned address",
    ),
    "four positions where fewer are left": Mistake(
        "dropout.cuh",
        "layout.positions - position;",
        "kDropoutGroup;",
        "dropout",
        MEMORY,
        "heap-buffer-overflow",
    ),
    "no barrier before shared memory is read": Mistake(
        "finalise.cuh", "__syncthreads();", "", "finalise", RACES, "data race"
    ),
    "a line too many": Mistake(
        "channel_walk.cuh",
        "smaller(cut.chunk_lines, cut.lines - place.line)",
        "cut.chunk_lines",
        "batch_norm",
        MEMORY,
        "heap-buffer-overflow",
    ),
    "no barrier between two rounds of a merge": Mistake(
        "channel_sums.cuh",
        "__syncthreads();\n    left = half;",
        "left = half;",
        "batch_norm",
        RACES,
        "data race",
    ),
    "means merged without their weights": Mistake(
        "channel_sums.cuh",
        "const double share = added / total;",
        "const double share = 0.5;",
        "batch_norm",
        MEMORY,
        "batch norm statistics f: mean",
    ),
}


def build(targets: Sequence[tuple[Path, Path, tuple[str, ...]]]) -> None:
    """Compiles (csrc, program, flags) side by side. -O0 compiles in half the time of -O1."""
    cuda_source.run_all(
        [
            cuda_source.for_host(
                csrc / "emulation" / f"check_{program.name}.cpp", program, ["-O0", *flags]
            )
            for csrc, program, flags in targets
        ]
    )


def run(program: Path) -> subprocess.CompletedProcess[str]:
    # A wrong barrier would wait for ever: the limit turns that into a failure.
    environment = os.environ | {"TSAN_OPTIONS": "halt_on_error=1"}
    return subprocess.run([program], env=environment, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, ...], Path]:
    """By sanitizer, the folder of the programs built with it."""
    folders = {flags: tmp_path_factory.mktemp("programs") for flags in (MEMORY, RACES)}
    build(
        [(cuda_source.CSRC, folders[MEMORY] / name, MEMORY) for name in PROGRAMS]
        + [(cuda_source.CSRC, folders[RACES] / name, RACES) for name in SHARING]
    )
    return folders


@pytest.mark.parametrize("name", PROGRAMS)
def test_memory_and_values(programs: dict[tuple[str, ...], Path], name: str) -> None:
    outcome = run(programs[MEMORY] / name)
    assert outcome.returncode == 0, outcome.stderr


@pytest.mark.parametrize("name", SHARING)
def test_shared_memory_has_no_races(programs: dict[tuple[str, ...], Path], name: str) -> None:
    outcome = run(programs[RACES] / name)
    assert outcome.returncode == 0, outcome.stderr


@pytest.fixture(scope="module")
def mistaken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    programs, targets = {}, []
    for title, mistake in MISTAKES.items():
        csrc = tmp_path_factory.mktemp("mistaken") / "csrc"
        shutil.copytree(cuda_source.CSRC, csrc)
        source = csrc / "cuda" / mistake.source
        text = source.read_text()
        assert text.count(mistake.right) == 1, f"{mistake.source} no longer says {mistake.right!r}"
        source.write_text(text.replace(mistake.right, mistake.wrong))
        programs[title] = csrc.parent / mistake.program
        targets.append((csrc, programs[title], mistake.flags))
    build(targets)
    return programs


@pytest.mark.parametrize("title", MISTAKES)
def test_mistakes_are_caught(mistaken: dict[str, Path], title: str) -> None:
    outcome = run(mistaken[title])
    assert outcome.returncode != 0
    assert MISTAKES[title].report in outcome.stderr
