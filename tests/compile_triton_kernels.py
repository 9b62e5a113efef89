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

from sbp_fast.ops import triton_batch_norm_kernels as batch_norm_kernels
from sbp_fast.ops import triton_dropout_kernels
from sbp_fast.ops import triton_kernels as kernels
from sbp_fast.ops.triton_batch_norm import View

WIDE = {"float32": tl.float32, "float64": tl.float64}
ALL = {**WIDE, "bfloat16": tl.bfloat16, "float16": tl.float16}


# Name, kernel, types of the run-time arguments, compile-time arguments.
Cases = Iterator[tuple[str, Any, dict[str, str], dict[str, Any]]]

# How batch norm reads memory, in vectors and, where none fits, element by element: then in the narrowest
# columns, whose addresses take the most registers.
VIEWS = {
    "planes": {"planes": True, "lines": 32, "channels": 64, "columns": 3136},
    "columns": {"planes": False, "lines": 9999, "channels": 256, "columns": 256},
    "planes_unaligned": {"planes": True, "lines": 32, "channels": 64, "columns": 49},
    "columns_unaligned": {"planes": False, "lines": 9999, "channels": 3, "columns": 3},
}
# Of two types that differ in their conversions alone, one is enough.
BATCH_NORM = [
    *itertools.product(("float32", "float64", "bfloat16"), ("planes", "columns")),
    *itertools.product(("float64", "bfloat16"), ("planes_unaligned", "columns_unaligned")),
    ("float16", "planes"),
]


def cases() -> Cases:
    for name, kernel, arguments, values in accumulation():
        yield name, kernel, arguments, {**values, "BLOCK": kernels.BLOCK}
    for name, kernel, arguments, values in dropout():
        yield name, kernel, arguments, {**values, "BLOCK": kernels.BLOCK}
    yield from batch_norm()


def accumulation() -> Cases:
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


def dropout() -> Cases:
    numbers = ("numel", "inner", "samples", "first_sample", "call", "seed_low", "seed_high")
    for dtype, kind in ALL.items():
        pointers = dict.fromkeys(("outputs", "inputs"), f"*{kind.name}")
        types = {**pointers, **dict.fromkeys(numbers, "i32"), "threshold": "i32"}
        for options, int64, grouped in (
            ("grouped", False, True),
            ("grouped_int64", True, True),
            ("single", False, False),
        ):
            yield (
                f"dropout-{dtype}-{dtype}-{options}",
                triton_dropout_kernels.dropout,
                {**types, "numel": "i64" if int64 else "i32", "scale_bits": "i64"},
                {"T": kind, "INT64": int64, "GROUPED": grouped},
            )


def batch_norm() -> Cases:
    sizes = dict.fromkeys(("lines", "channels", "vectors"), "i32")
    chunks = dict.fromkeys(("chunks", "tiles_per_chunk"), "i32")
    sums = {"coefficients": "*fp64", "partials": "*fp64"}
    for narrow, where in BATCH_NORM:
        options = View(**VIEWS[where], itemsize=ALL[narrow].primitive_bitwidth // 8).options
        element = "*" + ALL[narrow].name
        inputs, gradients, outputs = (
            {name: element} for name in ("inputs", "grad_outputs", "outputs")
        )
        for name, written, arguments in (
            ("statistics", "none", {**inputs, "partials": "*fp64", **sizes, **chunks}),
            ("backward_statistics", "none", {**gradients, **inputs, **sums, **sizes, **chunks}),
            ("normalise", narrow, {**outputs, **inputs, "coefficients": "*fp64", **sizes}),
            (
                "backward_apply",
                narrow,
                {**outputs, **gradients, **inputs, "coefficients": "*fp64", **sizes},
            ),
        ):
            kernel = getattr(batch_norm_kernels, name)
            yield f"batch_norm_{name}-{written}-{narrow}-{where}", kernel, arguments, options
    merge = {"partials": "*fp64", "results": "*fp64", "chunks": "i32", "channels": "i32"}
    tile = {"CHUNKS": 64, "CHANNELS": 16}
    name = "batch_norm_merge-none-float64-all"
    yield name, batch_norm_kernels.merge_statistics, merge, tile


def compile_all(folder: Path, capabilities: list[int]) -> None:
    for name, kernel, arguments, constants in cases():
        signature = {**arguments, **dict.fromkeys(constants, "constexpr")}
        # What a launch finds out: tables, partial results and tensors begin at multiples of 16 bytes.
        # One float64 of somebody else's may begin anywhere.
        aligned = {
            (position,): [["tt.divisibility", 16]]
            for position, (argument, type_) in enumerate(signature.items())
            if type_.startswith("*") and argument not in ("scale", "norm", "statistics")
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
