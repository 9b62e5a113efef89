"""SBP_FAST_REQUIRE=cuda,triton: there the other tests may not all be skipped and nobody notice."""

from __future__ import annotations

import os

import pytest
import torch

from sbp_fast.ops import availability

REQUIRED = [name for name in os.environ.get("SBP_FAST_REQUIRE", "").split(",") if name]


@pytest.mark.parametrize("backend", REQUIRED)
def test_required_backend_is_usable_on_the_device(backend: str) -> None:
    assert torch.cuda.is_available(), "torch sees no CUDA device"
    interpreted = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
    assert not (backend == "triton" and interpreted), "TRITON_INTERPRET is set; unset it"
    usable, reason = availability(backend)
    assert usable, reason
