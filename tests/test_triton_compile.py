"""The Triton kernels compiled ahead of time for sm_80, sm_90 and sm_100, and read back: 128-bit
accesses, no spills, rounding to nearest. Needs no GPU."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs Triton: pip install triton")

import triton

CAPABILITIES = (80, 90, 100)
BYTES = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2, "none": 0}
ELEMENTS_PER_THREAD = 8  # BLOCK / threads, as triton_kernels has it
TILE_BYTES_PER_THREAD = 64  # of one tensor, as triton_batch_norm has it

each_capability = pytest.mark.parametrize("capability", CAPABILITIES, ids="sm_{}".format)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of .ptx and .cubin files."""
    folder = tmp_path_factory.mktemp("compiled")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton_cache"))
    script = Path(__file__).with_name("compile_triton_kernels.py")
    processes = [
        subprocess.Popen(
            [sys.executable, script, folder, str(capability)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for capability in CAPABILITIES
    ]
    for process in processes:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    return folder


def files(folder: Path, suffix: str, capability: int, pattern: str = "*") -> list[Path]:
    found = sorted(folder.glob(f"{pattern}.sm_{capability}.{suffix}"))
    assert found
    return found


def cuobjdump() -> str:
    """Triton's wheel ships it; else the CUDA toolkit's."""
    shipped = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    tool = str(shipped) if shipped.exists() else shutil.which("cuobjdump")
    if tool is None:
        pytest.skip("cuobjdump not found, neither in Triton's package nor on PATH")
    return tool


def disassemble(option: str, cubin: Path) -> str:
    command = [cuobjdump(), option, cubin]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def wide_bytes(ptx: str, operation: str) -> int:
    """Bytes per thread that global accesses of 128 bits or more move, each instruction once."""
    total = 0
    for count, bits in re.findall(rf"\b{operation}\.global[\w.:]*\.v(\d)\.b(\d+)", ptx):
        if int(count) * int(bits) >= 128:
            total += int(count) * int(bits) // 8
    return total


@each_capability
def test_whole_blocks_move_in_128_bit_accesses(compiled: Path, capability: int) -> None:
    for path in files(compiled, "ptx", capability):
        kernel, written, read, options = path.name.split(".")[0].split("-")
        if kernel in ("add_statistics", "batch_norm_merge") or options.endswith("unaligned"):
            continue
        if kernel.startswith("batch_norm"):
            loads = TILE_BYTES_PER_THREAD * (2 if "backward" in kernel else 1)
            stores = TILE_BYTES_PER_THREAD if written != "none" else 0
        else:
            loads = BYTES[read] * ELEMENTS_PER_THREAD
            stores = BYTES[written] * ELEMENTS_PER_THREAD
            if options == "statistics":  # which reads what it writes
                loads += stores
        ptx = path.read_text()
        assert wide_bytes(ptx, "ld") >= loads, path.name
        assert wide_bytes(ptx, "st") >= stores, path.name


@each_capability
def test_unaligned_addresses_get_no_wide_access(compiled: Path, capability: int) -> None:
    for path in files(compiled, "ptx", capability, "*-unaligned"):
        ptx = path.read_text()
        assert not re.search(r"\b(ld|st)\.global[\w.:]*\.v\d", ptx), path.name


@each_capability
def test_casts_round_to_nearest(compiled: Path, capability: int) -> None:
    for wide in ("float32", "float64"):
        for narrow, short in {"bfloat16": "bf16", "float16": "f16"}.items():
            (path,) = files(compiled, "ptx", capability, f"finalise-{narrow}-{wide}-*")
            assert re.search(rf"\bcvt\.rn\.{short}(x2)?\.f32\b", path.read_text()), path.name
    for pattern in ("finalise-float32-float64-*", "scale_accumulate-float32-float64-statistics"):
        (path,) = files(compiled, "ptx", capability, pattern)
        assert re.search(r"\bcvt\.rn\.f32\.f64\b", path.read_text()), path.name
    for path in files(compiled, "ptx", capability):
        narrowing = re.findall(r"\bcvt\.(\w+)\.(?:b?f16(?:x2)?\.f32|f32\.f64)\b", path.read_text())
        assert set(narrowing) <= {"rn"}, path.name


@each_capability
def test_sums_have_a_fixed_order(compiled: Path, capability: int) -> None:
    for path in files(compiled, "ptx", capability):
        assert not re.search(r"\b(atom|red)\.", path.read_text()), path.name


@each_capability
def test_nothing_spills(compiled: Path, capability: int) -> None:
    for path in files(compiled, "cubin", capability):
        usage = disassemble("--dump-resource-usage", path)
        assert re.findall(r"\b(?:STACK|LOCAL):(\d+)", usage) == ["0", "0"], usage


@each_capability
@pytest.mark.parametrize(
    "name",
    [
        "scale_accumulate-float32-bfloat16-statistics",
        "scale_accumulate-float32-float32-statistics",
        "finalise-bfloat16-float32-clip",
        "batch_norm_normalise-bfloat16-bfloat16-planes",
        "batch_norm_backward_apply-float32-float32-columns",
    ],
)
def test_the_machine_code_agrees(compiled: Path, capability: int, name: str) -> None:
    (path,) = files(compiled, "cubin", capability, name)
    machine_code = disassemble("--dump-sass", path)
    assert re.search(r"\bLDG\.E[\w.]*\.128\b", machine_code)
    assert re.search(r"\bSTG\.E[\w.]*\.128\b", machine_code)
    assert not re.search(r"\b(LDL|STL)\b", machine_code)
