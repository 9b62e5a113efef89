"""The ``.triton`` overloads: one launch per kind of tensor, however many tensors a call brings.

Importable everywhere. Triton itself is imported at the first use, so a machine without it meets an
error, or the reason that ``is_available`` gives, only when it asks for this backend.

The chunk table is copied to the device at every call (gradients are new tensors each time), from
pinned memory and without waiting. Everything is queued on the current stream; nothing synchronises.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import checks, chunk_table
from .schemas import library

# The kind of a pair of tensors is written * len(_DTYPES) + read, both as positions in this list.
_DTYPES = checks.GRADIENT_DTYPES
_POSITION = {dtype: position for position, dtype in enumerate(_DTYPES)}
_ITEMSIZES = np.array([[a.itemsize, b.itemsize] for a in _DTYPES for b in _DTYPES], np.int64)

_INTERPRET = "set TRITON_INTERPRET=1 before Python starts to interpret them (slow: for tests)"


def is_available() -> tuple[bool, str]:
    """Whether the ``.triton`` overloads work here, and how; if not, why and what to do.

    Usable means: on CUDA or XPU tensors or, interpreted, on CPU tensors. Never raises.
    """
    try:
        kernels = _import_kernels()
    except ImportError as error:
        return False, f"Triton cannot be imported ({error}); pip install triton"
    version = f"Triton {kernels.triton.__version__}"
    if kernels.INTERPRETED.value:
        return True, f"{version}, interpreting on CPU tensors because TRITON_INTERPRET=1 is set"
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    elif torch.xpu.is_available():
        name = torch.xpu.get_device_name()
    else:
        return False, f"{version} finds no CUDA or XPU device for its kernels; {_INTERPRET}"
    try:
        # Triton compiles its driver's C code at the first use, which would be the first launch.
        kernels.triton.runtime.driver.active.get_current_target()
    except Exception as error:  # a compiler, a linker, a file system: anything may be missing
        return False, (
            f"{version} cannot build its driver for {name} ({error}); install a C compiler and "
            "Python's headers (Debian: apt-get install gcc python3-dev), or name a compiler in CC"
        )
    return True, f"{version} on {name}"


def scale_accumulate_(
    accumulators: Sequence[Tensor],
    gradients: Sequence[Tensor],
    scale: float,
    first_write: bool = False,
    statistics: Tensor | None = None,
) -> None:
    """See :func:`sbp_fast.ops.scale_accumulate_`.

    Raises:
        RuntimeError: what ``checks`` refuses; tensors out of Triton's reach. Nothing has been
            written then.
    """
    op = "scale_accumulate_"
    checks.check_scale_accumulate(accumulators, gradients, scale, first_write, statistics)
    if not accumulators:
        return
    kernels = _kernels_for(op, accumulators[0].device)
    with _on(accumulators[0].device):
        checks.check_separate(op, "accumulators", accumulators, "gradients", gradients)
        pairs = _flatten(accumulators, gradients, contents=not first_write)
        launches, chunks = _plan(kernels, pairs, scale)
        partials = _new_partials(kernels, pairs.written[0], chunks if statistics is not None else 0)
        for launch in launches:
            kernels.scale_accumulate[launch.grid](
                launch.table,
                partials[launch.first :],
                ACCUMULATOR=launch.written,
                GRADIENT=launch.read,
                FIRST_WRITE=first_write,
                STATISTICS=statistics is not None,
                ALIGNED=launch.aligned,
                **_options(kernels),
            )
        _add_partials(kernels, partials, statistics)
        pairs.copy_back()


def gradient_statistics_(gradients: Sequence[Tensor], statistics: Tensor) -> None:
    """See :func:`sbp_fast.ops.gradient_statistics_`.

    Raises:
        RuntimeError: as :func:`scale_accumulate_`.
    """
    checks.check_gradient_statistics(gradients, statistics)
    if not gradients:
        return
    kernels = _kernels_for("gradient_statistics_", gradients[0].device)
    with _on(gradients[0].device):
        dense = [g if checks.are_equal_and_dense(g, g) else g.contiguous() for g in gradients]
        launches, chunks = _plan(kernels, _Pairs(dense, dense, _numels(dense), []), 0.0)
        partials = _new_partials(kernels, dense[0], chunks)
        for launch in launches:
            kernels.gradient_statistics[launch.grid](
                launch.table,
                partials[launch.first :],
                GRADIENT=launch.read,
                ALIGNED=launch.aligned,
                **_options(kernels),
            )
        _add_partials(kernels, partials, statistics)


def finalise_(
    outputs: Sequence[Tensor],
    accumulators: Sequence[Tensor],
    scale: Tensor,
    norm: Tensor | None = None,
    max_norm: float | None = None,
) -> None:
    """See :func:`sbp_fast.ops.finalise_`. ``scale`` and ``norm`` are read by the kernel.

    Raises:
        RuntimeError: as :func:`scale_accumulate_`.
    """
    op = "finalise_"
    checks.check_finalise(outputs, accumulators, scale, norm, max_norm)
    if not outputs:
        return
    kernels = _kernels_for(op, outputs[0].device)
    with _on(outputs[0].device):
        checks.check_separate(op, "outputs", outputs, "accumulators", accumulators)
        pairs = _flatten(outputs, accumulators, contents=False)
        launches, _ = _plan(kernels, pairs, 0.0 if max_norm is None else max_norm)
        for launch in launches:
            kernels.finalise[launch.grid](
                launch.table,
                scale,
                scale if norm is None else norm,
                OUTPUT=launch.written,
                ACCUMULATOR=launch.read,
                CLIP=norm is not None,
                ALIGNED=launch.aligned,
                **_options(kernels),
            )
        pairs.copy_back()


@functools.cache
def _import_kernels() -> ModuleType:
    from . import triton_kernels

    return triton_kernels


def _kernels_for(op: str, device: torch.device) -> ModuleType:
    """The kernels, once it is sure that they can reach memory on ``device``.

    A kernel takes addresses as integers, so nothing further down would notice a wrong device."""
    try:
        kernels = _import_kernels()
    except ImportError as error:
        raise RuntimeError(
            f"{op}: Triton cannot be imported ({error}); pip install triton, or choose another "
            "backend"
        ) from error
    interpreted = kernels.INTERPRETED.value
    if device.type == "cpu" and not interpreted:
        raise RuntimeError(
            f"{op}: the tensors are on cpu, where Triton does not compile kernels; {_INTERPRET}, "
            "or choose another backend"
        )
    if device.type != "cpu" and interpreted:
        raise RuntimeError(
            f"{op}: the tensors are on {device}, but TRITON_INTERPRET=1 is set and interpreted "
            "kernels reach CPU memory only; unset it before Python starts"
        )
    return kernels


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensors' one."""
    if device.type == "cpu":
        return contextlib.nullcontext()
    guard: contextlib.AbstractContextManager[Any] = torch.get_device_module(device).device(device)
    return guard


@dataclass(frozen=True)
class _Pairs:
    """Tensors that a kernel can walk as flat memory: both of a pair in the same order, no gaps."""

    written: list[Tensor]
    read: list[Tensor]
    numels: chunk_table.Int64s
    stand_ins: list[tuple[Tensor, Tensor]]  # (the caller's tensor, the dense one written for it)

    @torch.no_grad()
    def copy_back(self) -> None:
        for original, stand_in in self.stand_ins:
            original.copy_(stand_in)


@torch.no_grad()
def _flatten(written: Sequence[Tensor], read: Sequence[Tensor], *, contents: bool) -> _Pairs:
    """Pairs of equal, dense strides stay as they are; of the others, what is in the way is copied.

    ``contents``: what is written is read as well, so that a stand-in for it starts as a copy.
    """
    pairs = _Pairs(list(written), list(read), _numels(written), [])
    for index, (target, source) in enumerate(zip(written, read, strict=True)):
        if checks.are_equal_and_dense(target, source):
            continue
        if not checks.are_equal_and_dense(target, target):
            stand_in = torch.empty_like(target, memory_format=torch.contiguous_format)
            if contents:
                stand_in.copy_(target)
            pairs.stand_ins.append((target, stand_in))
            pairs.written[index] = target = stand_in
        if not checks.are_equal_and_dense(target, source):
            pairs.read[index] = torch.empty_like(target, dtype=source.dtype).copy_(source)
    return pairs


@dataclass(frozen=True)
class _Launch:
    table: Tensor
    first: int
    grid: tuple[int]
    written: Any  # tl.dtype
    read: Any  # tl.dtype
    aligned: bool


def _plan(kernels: ModuleType, pairs: _Pairs, value: float) -> tuple[list[_Launch], int]:
    """The launches that cover all pairs, and the number of their chunks; the table in place."""
    kinds = [
        _POSITION[a.dtype] * len(_DTYPES) + _POSITION[b.dtype]
        for a, b in zip(pairs.written, pairs.read, strict=True)
    ]
    rows, groups = chunk_table.plan(
        _addresses(pairs.written),
        _addresses(pairs.read),
        pairs.numels,
        np.array(kinds, np.int64),
        _ITEMSIZES,
        value,
    )
    table = torch.from_numpy(rows)
    device = pairs.read[0].device
    if groups and device.type != "cpu":
        # The pinned copy may be dropped at once: its allocator reuses it only after the transfer.
        table = table.pin_memory().to(device, non_blocking=True)
    launches = [
        _Launch(
            table[group.first :],
            group.first,
            (group.chunks,),
            _triton_dtype(kernels, group.kind // len(_DTYPES)),
            _triton_dtype(kernels, group.kind % len(_DTYPES)),
            group.aligned,
        )
        for group in groups
    ]
    return launches, len(rows)


def _addresses(tensors: Sequence[Tensor]) -> chunk_table.Int64s:
    # Some devices use the upper half of the address space: negative as a signed integer.
    return np.array([tensor.data_ptr() for tensor in tensors], np.uint64).view(np.int64)


def _numels(tensors: Sequence[Tensor]) -> chunk_table.Int64s:
    return np.array([tensor.numel() for tensor in tensors], np.int64)


def _triton_dtype(kernels: ModuleType, position: int) -> Any:
    return getattr(kernels.tl, str(_DTYPES[position]).removeprefix("torch."))


def _options(kernels: ModuleType) -> dict[str, Any]:
    return {"BLOCK": kernels.BLOCK, **kernels.COMPILER_OPTIONS}


def _new_partials(kernels: ModuleType, like: Tensor, chunks: int) -> Tensor:
    columns = kernels.PARTIAL_COLUMNS.value
    return torch.empty((chunks, columns), dtype=torch.float64, device=like.device)


def _add_partials(kernels: ModuleType, partials: Tensor, statistics: Tensor | None) -> None:
    if statistics is not None and len(partials):
        kernels.add_statistics[(1,)](partials, statistics, len(partials), **_options(kernels))


for _name, _function in {
    "scale_accumulate_": scale_accumulate_,
    "gradient_statistics_": gradient_statistics_,
    "finalise_": finalise_,
}.items():
    library.impl(f"{_name}.triton", _function, "CompositeExplicitAutograd")
