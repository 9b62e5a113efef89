"""The CUDA sources compiled for sm_80, sm_90 and sm_100, and what the compiler made of them: no spills,
16-byte accesses, several of them in flight. Needs nvcc, but no GPU.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import cuda_source
import pytest
import torch

BYTES = {"double": 8, "float": 4, "c10::BFloat16": 2, "c10::Half": 2}
WIDEST = 16  # bytes per thread and access
UNROLL = 4  # as csrc/cuda/walk.cuh has it
MOST_REGISTERS = 64  # so that 1,024 threads fit on a multiprocessor
LOADS_OF_ELEMENTS = 8  # as csrc/cuda/channel_walk.cuh has it, where no vector fits
STATISTICS = "batch_norm_statistics"
MOST_FOR_CHANNELS = 128  # where a thread keeps what it knows of every channel of a vector


class Kernel(NamedTuple):
    capability: int
    name: str
    types: tuple[str, ...]  # template arguments: what is written, what is read, options


def parse_kernel(capability: str, demangled: str) -> Kernel:
    plain = re.sub(r"\((?:bool|int)\)", "", demangled)
    found = re.search(r"sbp_fast::cuda::(\w+)(?:<(.*)>)?\(", plain)
    assert found, demangled
    types = tuple(found[2].split(", ")) if found[2] else ()
    return Kernel(int(capability), found[1], types)


def demangle(names: list[str]) -> dict[str, str]:
    run = subprocess.run(
        [cuda_source.tool("c++filt", package="Debian's binutils")],
        input="\n".join(names),
        capture_output=True,
        text=True,
        check=True,
    )
    return dict(zip(names, run.stdout.splitlines(), strict=True))


@pytest.fixture(scope="module")
def compiled(pytestconfig: pytest.Config) -> Path:
    """A folder with a .cubin and a .log per architecture. Kept in pytest's cache for as long as nothing
    changes: compiling takes most of a minute."""
    compiler = subprocess.run([cuda_source.nvcc(), "--version"], capture_output=True, check=True)
    everything = hashlib.sha256(repr((commands(Path()), torch.__version__)).encode())
    everything.update(compiler.stdout)
    for path in sorted(cuda_source.CSRC.rglob("*")):
        if path.is_file() and "emulation" not in path.parts:
            everything.update(path.name.encode() + path.read_bytes())
    cache = pytestconfig.cache.mkdir("cuda_kernels")
    folder = cache / everything.hexdigest()[:16]
    if not (folder / "complete").exists():
        shutil.rmtree(cache)  # what older sources were compiled to
        folder.mkdir(parents=True)
        # One unit of all sources: reading torch's headers takes longer than compiling the kernels.
        includes = [f'#include "{source}"\n' for source in cuda_source.SOURCES]
        (folder / "all.cu").write_text("".join(includes))
        outcomes = cuda_source.run_all(commands(folder))
        for capability, outcome in zip(cuda_source.CAPABILITIES, outcomes, strict=True):
            (folder / f"sm_{capability}.log").write_text(outcome.stdout + outcome.stderr)
        (folder / "complete").touch()
    return folder


def commands(folder: Path) -> list[list[str]]:
    return [
        cuda_source.for_device(folder / "all.cu", folder / f"sm_{capability}.cubin", capability)
        for capability in cuda_source.CAPABILITIES
    ]


@pytest.fixture(scope="module")
def usage(compiled: Path) -> dict[Kernel, str]:
    """What ptxas says about every kernel."""
    pattern = re.compile(
        r"Compiling entry function '(\S+)' for 'sm_(\d+)'\n(.*?registers.*?)$", re.DOTALL | re.M
    )
    found = [
        match.groups()
        for path in sorted(compiled.glob("*.log"))
        for match in pattern.finditer(path.read_text())
    ]
    names = demangle(sorted({name for name, _, _ in found}))
    return {parse_kernel(capability, names[name]): text for name, capability, text in found}


@pytest.fixture(scope="module")
def machine_code(compiled: Path) -> dict[Kernel, list[str]]:
    """By flat kernel and kernel of batch norm, its accesses to global memory in order: "LDG.E.128",
    "STG.E.64" and so on."""
    triton = pytest.importorskip("triton", reason="Triton's wheel ships cuobjdump")
    shipped = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    cuobjdump = cuda_source.tool("cuobjdump", [str(shipped)], "Triton or the CUDA toolkit")
    listings: list[tuple[str, str, str]] = []
    outcomes = cuda_source.run_all(
        [
            [cuobjdump, "--dump-sass", str(compiled / f"sm_{capability}.cubin")]
            for capability in cuda_source.CAPABILITIES
        ]
    )
    for capability, outcome in zip(cuda_source.CAPABILITIES, outcomes, strict=True):
        for body in outcome.stdout.split("Function : ")[1:]:
            name, _, text = body.partition("\n")
            if "_flat" in name or "batch_norm_" in name:
                listings.append((name, str(capability), text))
    names = demangle(sorted({name for name, _, _ in listings}))
    return {
        parse_kernel(capability, names[name]): re.findall(
            r"\b((?:LD|ST)(?:G|L)?(?:\.[A-Z0-9]+)*) ", text
        )
        for name, capability, text in listings
    }


@pytest.fixture(scope="module")
def flat_code(machine_code: dict[Kernel, list[str]]) -> dict[Kernel, list[str]]:
    return {kernel: code for kernel, code in machine_code.items() if "_flat" in kernel.name}


@pytest.fixture(scope="module")
def channel_code(machine_code: dict[Kernel, list[str]]) -> dict[Kernel, list[str]]:
    """Of kernels with types (planes, elements of a vector, type of an element)."""
    return {kernel: code for kernel, code in machine_code.items() if "_flat" not in kernel.name}


def accessed(kernel: Kernel) -> tuple[str | None, str | None]:
    """The types that a flat kernel loads through its wide path, written and read ones."""
    if kernel.name == "statistics_flat":
        return None, kernel.types[0]
    if kernel.name == "finalise_flat" or kernel.types[2] in ("true", "1"):  # first write
        return None, kernel.types[1]
    return kernel.types[0], kernel.types[1]


def bits(kernel: Kernel, one: str) -> int:
    """Of one wide access: 16 bytes for the wider type, as many elements for the other."""
    widest = max(BYTES[name] for name in kernel.types if name in BYTES)
    return 8 * WIDEST * BYTES[one] // widest


def instruction(operation: str, width: int) -> str:
    return f"{operation}.E" + (f".{width}" if width > 32 else "")


def test_every_kernel_is_there(usage: dict[Kernel, str]) -> None:
    count: dict[str, int] = {}
    for kernel in usage:
        count[kernel.name] = count.get(kernel.name, 0) + 1
    architectures = len(cuda_source.CAPABILITIES)
    assert count == {
        "accumulate_flat": 2 * 4 * 2 * 2 * architectures,
        "accumulate_strided": 2 * 4 * architectures,
        "statistics_flat": 4 * architectures,
        "statistics_strided": 4 * architectures,
        "finalise_flat": 4 * 2 * architectures,
        "finalise_strided": 4 * 2 * architectures,
        "add_partials": architectures,
        # Planes and channels innermost, in vectors and by elements.
        "batch_norm_statistics": 4 * 2 * 2 * architectures,
        "batch_norm_normalise": 4 * 2 * 2 * architectures,
        "batch_norm_backward_statistics": 4 * 2 * 2 * architectures,
        "batch_norm_backward_apply": 4 * 2 * 2 * architectures,
        "merge_chunks": 2 * architectures,
        "dropout_rows": 4 * 2 * architectures,
        "dropout_channels_last": 4 * 2 * architectures,
        "probe": architectures,
    }


def test_no_spills_and_no_stack(usage: dict[Kernel, str]) -> None:
    for kernel, text in usage.items():
        numbers = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", text
        )
        assert numbers, f"{kernel}: {text}"
        assert numbers.groups() == ("0", "0", "0"), f"{kernel}: {text}"


def test_registers_leave_room_for_a_thousand_threads(usage: dict[Kernel, str]) -> None:
    for kernel, text in usage.items():
        used = re.search(r"Used (\d+) registers", text)
        assert used, f"{kernel}: {text}"
        keeps_channels = (
            kernel.name.startswith("batch_norm")
            and kernel.types[0] in ("false", "0")
            and kernel.types[1] != "1"
        )
        assert int(used[1]) <= (MOST_FOR_CHANNELS if keeps_channels else MOST_REGISTERS), kernel


def test_flat_kernels_move_sixteen_bytes_per_access(
    flat_code: dict[Kernel, list[str]],
) -> None:
    assert flat_code
    for kernel, code in flat_code.items():
        for one in accessed(kernel):
            if one is not None:
                assert instruction("LDG", bits(kernel, one)) in code, kernel
        if kernel.name != "statistics_flat":
            assert instruction("STG", bits(kernel, kernel.types[0])) in code, kernel
        assert any(access.endswith(".128") for access in code), kernel


def test_kernels_know_that_memory_is_global(machine_code: dict[Kernel, list[str]]) -> None:
    for kernel, code in machine_code.items():
        elsewhere = [access for access in code if not re.match(r"(LD|ST)G\b", access)]
        assert elsewhere == [], kernel


def test_flat_kernels_keep_several_loads_in_flight(flat_code: dict[Kernel, list[str]]) -> None:
    for kernel, code in flat_code.items():
        for one in accessed(kernel):
            if one is None:
                continue
            wanted = instruction("LDG", bits(kernel, one))
            longest = run = 0
            for access in code:
                if access.startswith("STG"):
                    run = 0
                run += access == wanted
                longest = max(longest, run)
            assert longest >= UNROLL, kernel


def test_channel_kernels_move_whole_vectors(channel_code: dict[Kernel, list[str]]) -> None:
    assert channel_code
    for kernel, code in channel_code.items():
        if kernel.types[1] == "1":
            continue
        stores = {access for access in code if access.startswith("STG")}
        loads = {access for access in code if access.startswith("LDG")}
        # Sums and coefficients are single float64.
        if "statistics" in kernel.name:
            assert stores == {"STG.E.64"}, kernel
        else:
            assert stores == {"STG.E.128"}, kernel
        assert loads == {"LDG.E.128"} | ({"LDG.E.64"} if kernel.name != STATISTICS else set()), (
            kernel
        )


def test_channel_kernels_keep_several_loads_in_flight(
    channel_code: dict[Kernel, list[str]],
) -> None:
    for kernel, code in channel_code.items():
        if kernel.types[1] == "1":
            in_flight = LOADS_OF_ELEMENTS
            wanted = {2: "LDG.E.U16", 4: "LDG.E", 8: "LDG.E.64"}[BYTES[kernel.types[2]]]
        else:
            in_flight, wanted = UNROLL, "LDG.E.128"
        tensors = 2 if "backward" in kernel.name else 1
        longest = run = 0
        for access in code:
            run = 0 if access.startswith("STG") else run + (access == wanted)
            longest = max(longest, run)
        assert longest >= tensors * in_flight, kernel
