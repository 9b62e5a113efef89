"""From accumulators to ``p.grad``: scale, clip and cast, in one pass or in none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops

# Where the dtype changes, old and new gradients are alive together: one group of this size at a time.
_GROUP_BYTES = 32 << 20


@dataclass(frozen=True)
class Finaliser:
    """Writes the large batch's gradient.

    Attributes:
        backend: see :func:`sbp_fast.ops.scale_accumulate_`.
        max_grad_norm: the largest norm that may remain (as in
            :func:`torch.nn.utils.clip_grad_norm_`), or None.
    """

    backend: str
    max_grad_norm: float | None

    def write(
        self,
        parameters: Sequence[Tensor],
        accumulators: list[Tensor | None],
        scale: float | Tensor,
        norm: Tensor,
    ) -> None:
        """Sets ``p.grad`` of every parameter that has an accumulator, and empties ``accumulators``.

        ``p.grad = accumulator * scale * min(1, max_grad_norm / (norm + 1e-6))`` in the parameter's dtype.
        The accumulator itself becomes ``p.grad`` where its dtype fits.
        """
        clips = self.max_grad_norm is not None and not self._is_within(norm)
        changes = clips or isinstance(scale, Tensor) or scale != 1.0
        outputs: list[Tensor] = []
        sources: list[Tensor] = []
        group_bytes = 0
        for index, parameter in enumerate(parameters):
            source, accumulators[index] = accumulators[index], None
            if source is None:
                continue
            # What autograd allows p.grad to be; None allows anything.
            dtype = parameter.grad_dtype or parameter.dtype
            fits = source.dtype == dtype
            output = source if fits else torch.empty_like(source, dtype=dtype)
            parameter.grad = output
            if fits and not changes:
                continue
            outputs.append(output)
            sources.append(source)
            group_bytes += 0 if fits else source.nbytes
            if group_bytes >= _GROUP_BYTES:
                self._write_group(outputs, sources, scale, norm if clips else None)
                outputs, sources, group_bytes = [], [], 0
                del source
        self._write_group(outputs, sources, scale, norm if clips else None)

    def check_narrowed(self, parameters: Sequence[Tensor], statistics: Tensor) -> None:
        """Sets ``statistics[2]`` where a finite sum became infinite in float16, whose range is small."""
        narrowed = [
            parameter.grad
            for parameter in parameters
            if parameter.grad is not None and parameter.grad.dtype == torch.float16
        ]
        ops.gradient_statistics_(narrowed, statistics, backend=self.backend)

    def _write_group(
        self,
        outputs: list[Tensor],
        sources: list[Tensor],
        scale: float | Tensor,
        norm: Tensor | None,
    ) -> None:
        ops.finalise_(
            outputs,
            sources,
            scale,
            norm=norm,
            max_norm=None if norm is None else self.max_grad_norm,
            backend=self.backend,
        )

    def _is_within(self, norm: Tensor) -> bool:
        # On CPU the norm can be read at no cost, and a gradient within its bound needs no pass.
        return norm.device.type == "cpu" and float(norm) + 1e-6 <= float(self.max_grad_norm or 0.0)
