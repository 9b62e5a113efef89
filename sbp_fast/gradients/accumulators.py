"""The running sums of gradients: one accumulator per parameter, fed as gradients become final."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import Parameter

from .. import ops

# On CPU a gradient is added while it is still in the cache; only crumbs (biases, norms) wait for one
# another, to share the cost of a call.
_CPU_BUCKET_BYTES = 1 << 20


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays, everything else is summed in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass
class _Bucket:
    """Gradients that wait for the next call, and what is to be done with each."""

    stores: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    additions: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    # Gradients that became accumulators as they were: only their statistics are wanted.
    observations: list[Tensor] = field(default_factory=list)
    indices: set[int] = field(default_factory=set)
    bytes: int = 0


class Accumulators:
    """Sums gradients over micro-batches, ``G = sum of G_i``, in place and one bucket at a time.

    The first gradient of a parameter becomes its accumulator where dtype and ownership allow it, so
    nothing is zeroed, allocated or copied for it. At most one bucket of gradients is alive beside the
    accumulators.

    Every gradient counts :attr:`scale` times; set it between flushes.

    During the last micro-batch the passes also collect statistics: :attr:`statistics` (see
    :func:`sbp_fast.ops.new_statistics`) then describes the whole gradient.
    """

    def __init__(self, parameters: Sequence[Parameter], *, backend: str) -> None:
        self._parameters = parameters
        self._backend = backend
        device = parameters[0].device
        self._bucket_bytes = _bucket_bytes(device)
        self._sums: list[Tensor | None] = [None] * len(parameters)
        self._observed = [False] * len(parameters)
        self._observed_twice = False
        self._observing = False
        self._bucket = _Bucket()
        self.scale = 1.0
        self.statistics = ops.new_statistics(device)

    def observe(self) -> None:
        """From here on (the last micro-batch) passes collect statistics."""
        self._observing = True

    def add(self, index: int, gradient: Tensor) -> None:
        """Takes the gradient of parameter ``index``; the caller must not use it any more.

        Raises:
            RuntimeError: the gradient is sparse.
        """
        if gradient.layout is not torch.strided:
            raise RuntimeError(
                f"the gradient of parameter {index} (shape {tuple(gradient.shape)}) has layout "
                f"{gradient.layout}; only dense gradients accumulate: use sparse=False"
            )
        if index in self._bucket.indices:
            # Two gradients for one accumulator must not meet in one call.
            self.flush()
        total = self._sums[index]
        bucket = self._bucket
        bucket.indices.add(index)
        if self._observing:
            self._observed_twice |= self._observed[index]
            self._observed[index] = True
        if total is not None:
            bucket.additions.append((total, gradient))
        elif (
            self.scale == 1.0
            and gradient.dtype == accumulator_dtype(gradient.dtype)
            and _owns_its_memory(gradient)
        ):
            self._sums[index] = gradient
            if not self._observing:
                return
            bucket.observations.append(gradient)
        else:
            total = torch.empty_like(gradient, dtype=accumulator_dtype(gradient.dtype))
            self._sums[index] = total
            bucket.stores.append((total, gradient))
        bucket.bytes += gradient.nbytes
        if bucket.bytes >= self._bucket_bytes:
            self.flush()

    def flush(self) -> None:
        """Adds what waits."""
        bucket, self._bucket = self._bucket, _Bucket()
        statistics = self.statistics if self._observing else None
        for pairs, first_write in ((bucket.stores, True), (bucket.additions, False)):
            if pairs:
                totals, gradients = zip(*pairs, strict=True)
                ops.scale_accumulate_(
                    list(totals),
                    list(gradients),
                    self.scale,
                    first_write=first_write,
                    statistics=statistics,
                    backend=self._backend,
                )
        if bucket.observations:
            ops.gradient_statistics_(bucket.observations, self.statistics, backend=self._backend)

    def finish(self) -> list[Tensor | None]:
        """The accumulators, by parameter; None where no gradient came. The object holds none after."""
        self.flush()
        self._complete_statistics()
        sums, self._sums = self._sums, [None] * len(self._parameters)
        return sums

    def _complete_statistics(self) -> None:
        # A parameter that the last micro-batch did not use was not seen by the last pass; one whose
        # gradient came in several parts (checkpointing re-enters autograd) was seen too often.
        if self._observed_twice:
            self.statistics.zero_()
            self._observed = [False] * len(self._parameters)
        unseen = [
            total
            for total, observed in zip(self._sums, self._observed, strict=True)
            if total is not None and not observed
        ]
        ops.gradient_statistics_(unseen, self.statistics, backend=self._backend)


def _owns_its_memory(gradient: Tensor) -> bool:
    """False where another tensor is a view of the same memory: of ``a + b.view_as(a)``, both gradients.

    Autograd hands such gradients out as they are; to add to one would change the other.
    """
    storage = gradient.untyped_storage()
    # Two owners: the gradient, and the Python object in the line above.
    return torch._C._storage_Use_Count(storage._cdata) <= 2


def _bucket_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        # Half of the L2: a gradient is still there when it is added.
        l2_bytes: int = torch.cuda.get_device_properties(device).L2_cache_size
        return l2_bytes // 2
    return _CPU_BUCKET_BYTES
