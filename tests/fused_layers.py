"""Counts the weight gradients that matrix products add, and lets the smallest of them be added so."""

from __future__ import annotations

from collections import Counter

import pytest
from torch import Tensor

from sbp_fast.gradients import Accumulators, fused


class Added(Counter[int]):
    """How often the gradient of each parameter, by position, was added by a matrix product."""


def note_added(monkeypatch: pytest.MonkeyPatch, *, least_bytes: int | None = 0) -> Added:
    """From here on; ``least_bytes``: of a weight, None for what the library itself takes."""
    if least_bytes is not None:
        monkeypatch.setattr(fused, "_LEAST_BYTES", least_bytes)
    added = Added()
    native = Accumulators.add_product

    def add_product(self: Accumulators, position: int, left: Tensor, right: Tensor) -> None:
        added[position] += 1
        native(self, position, left, right)

    monkeypatch.setattr(Accumulators, "add_product", add_product)
    return added
