"""Freed memory stays with the process where that was asked for: counted in page faults."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest

from sbp_fast.memory import freed_pages

# A process of its own, since there is no way back.
PROGRAM = """
import resource, sys
import torch
from sbp_fast.memory import keep_freed_pages

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

if sys.argv[1] == "keep":
    assert keep_freed_pages()
    assert keep_freed_pages()
torch.ones(16 << 20)
before = faults()
for _ in range(10):
    torch.ones(16 << 20)
print(faults() - before)
"""


def faults_of(argument: str) -> int:
    """Page faults of ten times 64 MiB, each of 16384 pages."""
    environment = {
        "MALLOC_MMAP_THRESHOLD_": str(1 << 20)
    }  # as of a young process, whatever comes first
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, argument],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **environment},
    )
    return int(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts page faults as Linux does")
def test_memory_is_not_mapped_again() -> None:
    if not freed_pages_can_be_kept():
        pytest.skip("the C library is not glibc")
    assert faults_of("leave") >= 10 * 16384
    # At most once more: the second tensor may come to lie elsewhere.
    assert faults_of("keep") < 2 * 16384


def freed_pages_can_be_kept() -> bool:
    return hasattr(ctypes.CDLL(None), "gnu_get_libc_version")


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Musl:
        """Has the function, and no such settings."""

        def mallopt(self, parameter: int, value: int) -> int:
            raise AssertionError

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Musl())
    assert not freed_pages.keep_freed_pages()
