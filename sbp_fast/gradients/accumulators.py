"""The running sums of gradients: one accumulator per parameter, fed as gradients become final."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .. import ops
from .hooks import GradientHooks
from .weight_gradient import add_product

# On CPU a gradient is added while it is still in the cache; only crumbs (biases, norms) wait for one
# another, to share the cost of a call.
_CPU_BUCKET_BYTES = 1 << 20


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays, everything else is summed in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass
class _Bucket:
    """Gradients that wait for the next call, and what is to be done with each; all by parameter."""

    stores: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    additions: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    # Gradients that became accumulators as they were: only their statistics are wanted.
    observations: dict[int, Tensor] = field(default_factory=dict)
    bytes: int = 0

    def __contains__(self, index: int) -> bool:
        return index in self.stores or index in self.additions or index in self.observations


def autograd_can_accumulate(parameter: Tensor) -> bool:
    """Whether ``p.grad``, as autograd fills it, can be the accumulator.

    It can on the CPU where its dtype is an accumulator's: adding in place moves the same bytes as our
    kernel, and saves a Python hook per gradient, which is slow after a convolution has emptied the
    caches of all else. Other devices want many gradients in one launch.
    """
    dtype = parameter.dtype
    fits = dtype == parameter.grad_dtype == accumulator_dtype(dtype)
    return fits and parameter.device.type == "cpu"


class Accumulators:
    """Sums gradients over micro-batches, ``G = sum of G_i``, in place and one bucket at a time.

    The first gradient of a parameter becomes its accumulator where dtype and ownership allow it, so
    nothing is zeroed, allocated or copied for it. At most one bucket of gradients is alive beside the
    accumulators. What ``hooks`` does not watch, autograd sums in ``p.grad`` by itself.

    During the last micro-batch the passes also collect statistics: :attr:`statistics` (see
    :func:`sbp_fast.ops.new_statistics`) then describes the whole gradient.

    Attributes:
        arrived: parameters whose gradients of the current micro-batch are wholly in, where its backward
            pass fails half way.
    """

    def __init__(
        self, hooks: GradientHooks, *, backend: str, bucket_bytes: int | None = None
    ) -> None:
        """``bucket_bytes``: the most that waits for the next call; None for what suits the device."""
        self._hooks = hooks
        self._parameters = hooks.parameters
        self._backend = backend
        device = self._parameters[0].device
        self._bucket_bytes = usual_bucket_bytes(device) if bucket_bytes is None else bucket_bytes
        self._sums: list[Tensor | None] = [None] * len(self._parameters)
        self._observed = [False] * len(self._parameters)
        self._observed_twice = False
        self._observing = False
        self._bucket = _Bucket()
        self._scale = 1.0
        self._left_out: frozenset[int] = frozenset()
        self.arrived: set[int] = set()
        self.statistics = ops.new_statistics(device)
        # Somebody else's hook may take a gradient away, which only a hook of ours would notice.
        hooks.watch([i for i in hooks.unwatched if self._parameters[i]._post_accumulate_grad_hooks])
        self._unowned = sorted(hooks.unwatched)

    @contextmanager
    def collecting(self, scale: float, left_out: frozenset[int] = frozenset()) -> Iterator[None]:
        """Around the backward pass of one micro-batch: takes its gradients, each ``scale`` times.

        Args:
            left_out: parameters whose gradients are not taken, since they are in already.

        Raises:
            RuntimeError: a gradient is sparse, or another hook took it.
        """
        if self._hooks.unwatched and (scale != 1.0 or left_out):
            self._stop_autograd_from_adding()
        if left_out:
            # Memory is short: none for gradients that wait for one another.
            self._bucket_bytes = 0
        self._scale, self._left_out = scale, left_out
        versions = self._versions()
        try:
            with self._hooks.delivering_to(self._add):
                yield
            self._flush()
        except BaseException:
            self._drop_bucket()
            now = self._versions()
            self.arrived.update(i for i, version in versions.items() if now[i] != version)
            raise
        self._own_what_autograd_keeps()

    def begin_micro_batch(self) -> None:
        """Nothing of it has arrived."""
        self.arrived = set()

    def observe(self, observing: bool = True) -> None:
        """Whether passes collect statistics: from the last micro-batch on."""
        self._observing = observing

    def add_product(self, index: int, left: Tensor, right: Tensor) -> None:
        """Adds the product of two matrices, ``scale`` times: the gradient of a parameter with as many
        rows and columns. Called in the backward pass, in place of all that autograd would bring."""
        self._hooks.bypass(index)
        if index in self._left_out:
            return
        if index in self._bucket:
            self._flush()
        parameter = self._parameters[index]
        autograd_adds = index in self._hooks.unwatched
        before = parameter.grad if autograd_adds else self._sums[index]
        total = before
        if total is None:
            total = torch.empty_like(parameter, dtype=accumulator_dtype(parameter.dtype))
        rows = total.view(len(total), -1)
        add_product(rows, left, right, self._scale, first_write=before is None)
        if autograd_adds:
            parameter.grad = total
        else:
            self._sums[index] = total
        self.arrived.add(index)
        # Where another part has come before this one, its statistics are not those of the sum.
        self._observed_twice |= self._observed[index]

    def sum_of_squares(self) -> Tensor:
        """Of all that is in so far, between two micro-batches; float64, no dimensions. One read."""
        unwatched = self._hooks.unwatched
        sums = [p.grad if i in unwatched else self._sums[i] for i, p in enumerate(self._parameters)]
        statistics = torch.zeros_like(self.statistics)
        ops.gradient_statistics_(
            [total for total in sums if total is not None], statistics, backend=self._backend
        )
        return statistics[1]

    def _add(self, index: int, gradient: Tensor) -> None:
        self._check_dense(index, gradient)
        if index in self._left_out:
            return
        if index in self._bucket:
            # Two gradients for one accumulator must not meet in one call.
            self._flush()
        total = self._sums[index]
        bucket = self._bucket
        if total is not None:
            bucket.additions[index] = (total, gradient)
        elif (
            self._scale == 1.0
            and gradient.dtype == accumulator_dtype(gradient.dtype)
            and _owns_its_memory(gradient)
        ):
            self._sums[index] = gradient
            self.arrived.add(index)
            if not self._observing:
                return
            bucket.observations[index] = gradient
        else:
            total = torch.empty_like(gradient, dtype=accumulator_dtype(gradient.dtype))
            self._sums[index] = total
            bucket.stores[index] = (total, gradient)
        bucket.bytes += gradient.nbytes
        if bucket.bytes >= self._bucket_bytes:
            self._flush()

    def _flush(self) -> None:
        statistics = self.statistics if self._observing else None
        bucket = self._bucket
        for pairs, first_write in ((bucket.stores, True), (bucket.additions, False)):
            if pairs:
                totals, gradients = zip(*pairs.values(), strict=True)
                ops.scale_accumulate_(
                    list(totals),
                    list(gradients),
                    self._scale,
                    first_write=first_write,
                    statistics=statistics,
                    backend=self._backend,
                )
                self._note(pairs)
                pairs.clear()
        if bucket.observations:
            ops.gradient_statistics_(
                list(bucket.observations.values()), self.statistics, backend=self._backend
            )
            self._note(bucket.observations)
        self._bucket = _Bucket()

    def _note(self, indices: Iterable[int]) -> None:
        self.arrived.update(indices)
        if self._observing:
            for index in indices:
                self._observed_twice |= self._observed[index]
                self._observed[index] = True

    def _drop_bucket(self) -> None:
        for index in self._bucket.stores:
            self._sums[index] = None
        self._bucket = _Bucket()

    def _versions(self) -> dict[int, int | None]:
        """Autograd adds in place, which raises the version of ``p.grad``."""
        gradients = {index: self._parameters[index].grad for index in self._hooks.unwatched}
        return {i: None if g is None else g._version for i, g in gradients.items()}

    def finish(self) -> list[Tensor | None]:
        """The accumulators, by parameter; None where no gradient came. The object holds none after."""
        for index in self._hooks.unwatched:
            self._sums[index] = self._parameters[index].grad
        self._complete_statistics()
        sums, self._sums = self._sums, [None] * len(self._parameters)
        return sums

    def _own_what_autograd_keeps(self) -> None:
        """Looks at each ``p.grad`` once, when it has appeared: the next gradients are added to it."""
        for index in self._unowned:
            gradient = self._parameters[index].grad
            if gradient is not None:
                self._check_dense(index, gradient)
                if not _owns_its_memory(gradient):
                    self._parameters[index].grad = gradient.clone()
        self._unowned = [i for i in self._unowned if self._parameters[i].grad is None]

    def _stop_autograd_from_adding(self) -> None:
        # Autograd adds gradients as they are, never scaled, and never leaves one out.
        self._own_what_autograd_keeps()
        for index in self._hooks.unwatched:
            parameter = self._parameters[index]
            self._sums[index], parameter.grad = parameter.grad, None
        self._hooks.watch(range(len(self._parameters)))
        self._unowned = []

    def _check_dense(self, index: int, gradient: Tensor) -> None:
        if gradient.layout is not torch.strided:
            raise RuntimeError(
                f"the gradient of {self._hooks.names[index]} (shape {tuple(gradient.shape)}) has layout "
                f"{gradient.layout}; only dense gradients accumulate: use sparse=False"
            )

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


def usual_bucket_bytes(device: torch.device) -> int:
    """Bytes of gradients that share a call."""
    if device.type == "cuda":
        # Half of the L2: a gradient is still there when it is added.
        l2_bytes: int = torch.cuda.get_device_properties(device).L2_cache_size
        return l2_bytes // 2
    return _CPU_BUCKET_BYTES
