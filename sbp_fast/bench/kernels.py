"""The kernels against torch's own ways, numpy and the ceiling.

Bytes counted per element are what the task must move at least: accumulating bfloat16 gradients into
float32 accumulators reads 2 + 4 and writes 4; a first write reads 2 and writes 4; finalising float32
accumulators into bfloat16 gradients reads 4 and writes 2; statistics read 2 or 4. Every contender of a
case is credited with these, whatever it moves in truth, so GB/s compare as times do.

Peers compute less than ours where they have no statistics: torch's additions collect none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from .. import ops
from . import rivals
from .case import Case, Contender
from .shapes import Shape
from .stream_ceiling import Ceilings
from .tensor_lists import TensorSets, make_set, make_sets

_ACCUMULATOR_BYTES = torch.float32.itemsize
_OVERHEAD_TENSORS = 161
_OVERHEAD_ELEMENTS = 64
_OVERHEAD_CALLS = 50

_DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}


def our_backends(device: torch.device) -> list[str]:
    """The compiled backends that can be measured on ``device``, best first."""
    candidates = ("cuda", "triton") if device.type == "cuda" else ("cpu",)
    return [name for name in candidates if ops.availability(name).usable] or ["reference"]


def cases(
    shapes: Sequence[Shape], device: torch.device, ceiling_elements: int
) -> list[Callable[[], Case]]:
    """All kernel cases, yet to be made: drop one before making the next, and memory holds one."""
    ceilings = Ceilings(device, ceiling_elements)
    makers: list[Callable[[], Case]] = [partial(_ceiling_case, ceilings, ceiling_elements)]
    dtypes = (torch.bfloat16, torch.float32)
    for make in (_accumulate, _first_write, _statistics):
        makers += [partial(make, shapes, dtype, device, ceilings) for dtype in dtypes]
    makers.append(partial(_finalise, shapes, device, ceilings))
    for held_by_parameters in (False, True):
        makers.append(partial(_overhead, device, held_by_parameters=held_by_parameters))
    return makers


def _ceiling_case(ceilings: Ceilings, elements: int) -> Case:
    every = ceilings.all()
    return Case(
        benchmark="ceiling",
        name="memory bandwidth, fp32",
        dtype=torch.float32,
        tensors=1,
        elements=elements,
        bytes=0,
        contenders=[Contender(one.name, one.call, bytes=one.bytes) for one in every],
    )


def _accumulate(
    shapes: Sequence[Shape], dtype: torch.dtype, device: torch.device, ceilings: Ceilings
) -> Case:
    sets = make_sets(shapes, dtype, device)
    ceiling = ceilings.like("update")
    opponents = {"torch._foreach_add_": "speedup", ceiling.name: "bandwidth"}
    contenders = []
    for backend in our_backends(device):
        for suffix, statistics in ((" + statistics", ops.new_statistics(device)), ("", None)):
            call = rivals.ours_accumulate(sets, backend, statistics=statistics)
            contenders.append(Contender(f"sbp_fast {backend}{suffix}", call, opponents))
    to_ceiling = {ceiling.name: "bandwidth"}
    contenders += [
        Contender("torch._foreach_add_", rivals.foreach_add(sets), to_ceiling),
        Contender("torch add_ per tensor", rivals.add_per_tensor(sets), to_ceiling),
        Contender("torch add_ flat", rivals.add_flat(sets), to_ceiling),
    ]
    if device.type == "cpu":
        contenders.append(Contender("numpy per tensor", rivals.numpy_add(sets), to_ceiling))
    return Case(
        benchmark="accumulate",
        name=f"{_DTYPE_NAMES[dtype]} gradients into fp32 accumulators",
        dtype=dtype,
        tensors=sets.tensors,
        elements=sets.elements,
        bytes=sets.elements * (dtype.itemsize + 2 * _ACCUMULATOR_BYTES),
        contenders=[*contenders, Contender(ceiling.name, ceiling.call, bytes=ceiling.bytes)],
    )


def _first_write(
    shapes: Sequence[Shape], dtype: torch.dtype, device: torch.device, ceilings: Ceilings
) -> Case:
    sets = make_sets(shapes, dtype, device)
    ceiling = ceilings.like("scale")
    contenders = []
    for backend in our_backends(device):
        zero_and_add = f"sbp_fast {backend} zero + add"
        opponents = {
            "torch zero + add": "speedup",
            zero_and_add: "speedup",
            ceiling.name: "bandwidth",
        }
        statistics = ops.new_statistics(device)
        contenders += [
            Contender(
                f"sbp_fast {backend} first write",
                rivals.ours_accumulate(sets, backend, statistics=statistics, first_write=True),
                opponents,
            ),
            Contender(zero_and_add, rivals.ours_zero_and_add(sets, backend, statistics)),
        ]
    return Case(
        benchmark="first write",
        name=f"{_DTYPE_NAMES[dtype]} gradients into empty fp32 accumulators",
        dtype=dtype,
        tensors=sets.tensors,
        elements=sets.elements,
        bytes=sets.elements * (dtype.itemsize + _ACCUMULATOR_BYTES),
        contenders=[
            *contenders,
            Contender("torch zero + add", rivals.foreach_zero_and_add(sets)),
            Contender(ceiling.name, ceiling.call, bytes=ceiling.bytes),
        ],
    )


def _finalise(shapes: Sequence[Shape], device: torch.device, ceilings: Ceilings) -> Case:
    sets = make_sets(shapes, torch.bfloat16, device)
    ceiling = ceilings.like("scale")
    opponents = {"torch._foreach_mul_ + copy": "speedup", ceiling.name: "bandwidth"}
    return Case(
        benchmark="finalise",
        name="fp32 accumulators scaled, clipped and cast to bf16",
        dtype=torch.bfloat16,
        tensors=sets.tensors,
        elements=sets.elements,
        bytes=sets.elements * (_ACCUMULATOR_BYTES + torch.bfloat16.itemsize),
        contenders=[
            *(
                Contender(f"sbp_fast {backend}", rivals.ours_finalise(sets, backend), opponents)
                for backend in our_backends(device)
            ),
            Contender("torch._foreach_mul_ + copy", rivals.foreach_mul_and_copy(sets)),
            Contender(ceiling.name, ceiling.call, bytes=ceiling.bytes),
        ],
    )


def _statistics(
    shapes: Sequence[Shape], dtype: torch.dtype, device: torch.device, ceilings: Ceilings
) -> Case:
    sets = make_sets(shapes, dtype, device)
    ceiling = ceilings.like("read")
    opponents = {"torch._foreach_norm": "speedup", ceiling.name: "bandwidth"}
    return Case(
        benchmark="statistics",
        name=f"norm and finiteness of {_DTYPE_NAMES[dtype]} gradients",
        dtype=dtype,
        tensors=sets.tensors,
        elements=sets.elements,
        bytes=sets.elements * dtype.itemsize,
        contenders=[
            *(
                Contender(f"sbp_fast {backend}", rivals.ours_statistics(sets, backend), opponents)
                for backend in our_backends(device)
            ),
            Contender("torch._foreach_norm", rivals.foreach_norm(sets)),
            Contender(ceiling.name, ceiling.call, bytes=ceiling.bytes),
        ],
    )


def _overhead(device: torch.device, *, held_by_parameters: bool) -> Case:
    """What a call costs beside the work: small tensors, which stay in the caches.

    Tensors that some C++ object holds (a parameter its ``.grad``) cost less in a call than tensors that
    only Python holds: the interpreter's reference to those must be counted up and down.
    """
    shapes = [(_OVERHEAD_ELEMENTS,)] * _OVERHEAD_TENSORS
    sets = TensorSets(
        [make_set(shapes, torch.float32, device, held_by_parameters=held_by_parameters)]
    )
    contenders = []
    for backend in our_backends(device):
        for suffix, statistics in (("", None), (" + statistics", ops.new_statistics(device))):
            call = rivals.ours_accumulate(sets, backend, statistics=statistics)
            opponents = {"torch._foreach_add_": "speedup"}
            contenders.append(Contender(f"sbp_fast {backend}{suffix}", call, opponents))

    return Case(
        benchmark="overhead",
        name=f"{_OVERHEAD_TENSORS} tensors of {_OVERHEAD_ELEMENTS} elements, held by "
        + ("parameters" if held_by_parameters else "Python"),
        dtype=torch.float32,
        tensors=sets.tensors,
        elements=sets.elements,
        bytes=0,
        contenders=[
            *contenders,
            Contender("torch._foreach_add_", rivals.foreach_add(sets)),
            Contender("torch add_ per tensor", rivals.add_per_tensor(sets)),
        ],
        calls=_OVERHEAD_CALLS,
    )
