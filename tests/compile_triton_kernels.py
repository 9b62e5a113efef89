"""Compiles the Triton kernels for GPUs that need not be here. A program of its own, because with
TRITON_INTERPRET=1, as in the tests, there is nothing to compile.

    python compile_triton_kernels.py FOLDER CAPABILITY...

Writes for every kernel, kind of tensors and capability (80: sm_80) one .ptx and one .cubin file
into FOLDER, named ``kernel-written-read-options.sm_80``.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sbp_fast.ops import triton_kernels as kernels

WIDE = {"float32": tl.float32, "float64": tl.float64}
ALL = {**WIDE, "bfloat16": tl.bfloat16, "float16": tl.float16}


def cases() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any]]]:
    """Name, kernel, types of the run-time arguments, compile-time arguments."""
    accumulate = {"table": "*i64", "partials": "*fp64"}
    for wide, narrow in itertools.product(WIDE, ALL):
        types = {"ACCUMULATOR": WIDE[wide], "GRADIENT": ALL[narrow]}
        for options, values in {
            "statistics": {"FIRST_WRITE": False, "STATISTICS": True, "ALIGNED": True},
            "first_write": {"FIRST_WRITE": True, "STATISTICS": False, "ALIGNED": True},
            "unaligned": {"FIRST_WRITE": False, "STATISTICS": True, "ALIGNED": False},
        }.items():
            if options == "statistics" or wide == "float32":
                name = f"scale_accumulate-{wide}-{narrow}-{options}"
                yield name, kernels.scale_accumulate, accumulate, {**types, **values}
        finalise = {"table": "*i64", "scale": "*fp64", "norm": "*fp64"}
        types = {"OUTPUT": ALL[narrow], "ACCUMULATOR": WIDE[wide], "CLIP": True, "ALIGNED": True}
        yield f"finalise-{narrow}-{wide}-clip", kernels.finalise, finalise, types
    for narrow in ALL:
        types = {"GRADIENT": ALL[narrow], "ALIGNED": True}
        name = f"gradient_statistics-none-{narrow}-statistics"
        yield name, kernels.gradient_statistics, accumulate, types
    total = {"partials": "*fp64", "statistics": "*fp64", "chunks": "i32"}
    yield "add_statistics-none-float64-all", kernels.add_statistics, total, {}


def compile_all(folder: Path, capabilities: list[int]) -> None:
    for name, kernel, arguments, values in cases():
        constants = {**values, "BLOCK": kernels.BLOCK}
        signature = {**arguments, **dict.fromkeys(constants, "constexpr")}
        # What a launch finds out: the table and the partial results begin at multiples of 16 bytes.
        aligned = {
            (position,): [["tt.divisibility", 16]]
            for position, argument in enumerate(signature)
            if argument in ("table", "partials")
        }
        for capability in capabilities:
            compiled = triton.compile(
                ASTSource(kernel, signature, constants, aligned),
                target=GPUTarget("cuda", capability, 32),
                options=kernels.COMPILER_OPTIONS,
            )
            stem = f"{name}.sm_{capability}"
            (folder / f"{stem}.ptx").write_text(compiled.asm["ptx"])
            (folder / f"{stem}.cubin").write_bytes(compiled.asm["cubin"])


if __name__ == "__main__":
    compile_all(Path(sys.argv[1]), [int(capability) for capability in sys.argv[2:]])
