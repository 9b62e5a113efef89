"""Counts the weight gradients that matrix products add, and lets the smallest of them be added so."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest

from sbp_fast.gradients import Accumulators, fused


class Added(Counter[int]):
    """How often the gradient of each parameter, by position, was added by a matrix product."""


def note_added(monkeypatch: pytest.MonkeyPatch, *, least_bytes: int | None = 0) -> Added:
    """From here on; ``least_bytes``: of a weight, None for what the library itself takes."""
    if least_bytes is not None:
        monkeypatch.setattr(fused, "_LEAST_BYTES", least_bytes)
    added = Added()
    native = Accumulators.add_products

    def add_products(self: Accumulators, position: int, products: Sequence[Any]) -> None:
        added[position] += 1
        native(self, position, products)

    monkeypatch.setattr(Accumulators, "add_products", add_products)
    return added
