"""What nvcc made of the dropout kernels for sm_80, sm_90 and sm_100. That nothing spills, and how many
registers they use, test_cuda_compile.py says for all kernels. Needs nvcc, but no GPU."""

from __future__ import annotations

import re
from pathlib import Path

import cuda_source
import pytest
from test_cuda_compile import BYTES, Kernel, compiled, demangle, parse_kernel  # noqa: F401

LOADS_IN_FLIGHT = 4  # kUnroll of csrc/cuda/walk.cuh; positions of a group


@pytest.fixture(scope="module")
def machine_code(compiled: Path) -> dict[Kernel, str]:  # noqa: F811
    triton = pytest.importorskip("triton", reason="Triton's wheel ships cuobjdump")
    shipped = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    cuobjdump = cuda_source.tool("cuobjdump", [str(shipped)], "Triton or the CUDA toolkit")
    listings: dict[tuple[str, str], str] = {}
    for capability in cuda_source.CAPABILITIES:
        cubin = compiled / f"sm_{capability}.cubin"
        (outcome,) = cuda_source.run_all([[cuobjdump, "--dump-sass", str(cubin)]])
        for body in outcome.stdout.split("Function : ")[1:]:
            name, _, text = body.partition("\n")
            if "dropout" in name:
                listings[str(capability), name] = text
    names = demangle(sorted({name for _, name in listings}))
    return {
        parse_kernel(capability, names[name]): text for (capability, name), text in listings.items()
    }


def accesses(text: str) -> list[str]:
    """To memory of any kind, in order: "LDG.E.128", "STG.E.64" and so on."""
    found: list[str] = re.findall(r"\b((?:LD|ST)(?:G|L|S)?(?:\.[A-Z0-9]+)*) ", text)
    return found


def longest_run(code: list[str], wanted: str) -> int:
    """Loads of one kind with no store among them."""
    longest = run = 0
    for access in code:
        run = 0 if access.startswith("ST") else run + (access == wanted)
        longest = max(longest, run)
    return longest


def test_wide_kernels_move_whole_vectors_and_load_several_first(
    machine_code: dict[Kernel, str],
) -> None:
    seen = 0
    for kernel, text in machine_code.items():
        dtype, width = kernel.types[0], int(kernel.types[1].removeprefix("(int)"))
        if width == 1:
            continue
        seen += 1
        bits = 8 * width * BYTES[dtype]
        # Channels last, noise of more than four channels does not fit the registers.
        assert bits == (64 if kernel.name == "dropout_channels_last" and BYTES[dtype] == 2 else 128)
        code = accesses(text)
        assert longest_run(code, f"LDG.E.{bits}") >= LOADS_IN_FLIGHT, kernel
        assert code.count(f"STG.E.{bits}") == code.count(f"LDG.E.{bits}"), kernel
    assert seen == 2 * 4 * len(cuda_source.CAPABILITIES)


def test_words_stay_in_registers_and_memory_is_global(machine_code: dict[Kernel, str]) -> None:
    for kernel, text in machine_code.items():
        elsewhere = [access for access in accesses(text) if not re.match(r"(LD|ST)G\b", access)]
        assert elsewhere == [], kernel


def test_products_of_words_are_single_instructions(machine_code: dict[Kernel, str]) -> None:
    """Ten rounds of two products of 64 bits."""
    for kernel, text in machine_code.items():
        assert len(re.findall(r"\bIMAD\.WIDE\.U32\b", text)) >= 20, kernel
