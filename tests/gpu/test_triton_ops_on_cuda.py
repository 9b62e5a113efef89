"""The Triton ops, compiled, on a CUDA device: what elsewhere runs interpreted, and streams."""

from __future__ import annotations

import os

import pytest
import torch

pytest.register_assert_rewrite("triton_parity")

import tolerances  # noqa: E402
from triton_parity import (  # noqa: E402
    TritonParity,
    finalise_,
    relative_error,
    scale_accumulate_,
)

from sbp_fast.ops import triton_backend  # noqa: E402

GIB = 2**30


def why_not() -> str:
    if not torch.cuda.is_available():
        return "needs a CUDA device"
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        return "TRITON_INTERPRET=1 is set; unset it to test compiled kernels"
    usable, reason = triton_backend.is_available()
    return "" if usable else reason


pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not() or "usable")


class TestOnCuda(TritonParity):
    device = "cuda"

    def test_a_side_stream_is_used_and_waited_for(self) -> None:
        """Gradients arrive late on a side stream: work on another stream would find zeros."""
        side = torch.cuda.Stream()
        source = [self.random(100_000, seed=seed) for seed in range(20)]
        half = self.scalar(0.5)
        for _ in range(2):  # the first time compiles, which would outlast the delay
            torch.cuda.synchronize()
            with torch.cuda.stream(side):
                accumulators = [torch.zeros_like(tensor) for tensor in source]
                gradients = [torch.zeros_like(tensor, dtype=torch.bfloat16) for tensor in source]
                outputs = [torch.zeros_like(gradient) for gradient in gradients]
                statistics = self.statistics()
                torch.cuda._sleep(200_000_000)
                for gradient, tensor in zip(gradients, source, strict=True):
                    gradient.copy_(tensor)
                scale_accumulate_(accumulators, gradients, 2.0, False, statistics)
                finalise_(outputs, accumulators, half)
            side.synchronize()
            for output, tensor in zip(outputs, source, strict=True):
                assert torch.equal(output, tensor.to(torch.bfloat16))
            assert statistics[0] > 0
            assert statistics[2] == 0.0

    def test_nothing_waits_for_the_device(self) -> None:
        accumulators = [self.random(1000) for _ in range(50)]
        gradients = [self.random(1000, dtype=torch.bfloat16) for _ in range(50)]
        statistics, scale, norm = self.statistics(), self.scalar(1.0), self.scalar(2.0)

        def call() -> None:
            scale_accumulate_(accumulators, gradients, 0.5, False, statistics)
            finalise_(gradients, accumulators, scale, norm, 1.0)

        call()  # compiles, and fills the allocators
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
    def test_tensors_on_another_device_than_the_current_one(self) -> None:
        accumulator = torch.zeros(1000, device="cuda:1")
        scale_accumulate_([accumulator], [torch.ones_like(accumulator)], 2.0)
        assert torch.equal(accumulator, torch.full_like(accumulator, 2.0))

    def test_more_than_two_to_the_31_elements(self) -> None:
        if torch.cuda.mem_get_info()[0] < 16 * GIB:
            pytest.skip("needs 16 GiB of free device memory")
        numel = 2**31 + 12345
        accumulator = torch.zeros(numel, device="cuda")
        gradient = torch.ones(numel, dtype=torch.bfloat16, device="cuda")
        statistics = self.statistics()
        scale_accumulate_([accumulator], [gradient], 3.0, False, statistics)
        assert statistics.tolist() == [float(numel), 9.0 * numel, 0.0]
        for part in (slice(0, 9), slice(2**31 - 9, 2**31 + 9), slice(numel - 9, numel)):
            assert bool((accumulator[part] == 3.0).all())
        finalise_([gradient], [accumulator], self.scalar(0.5))
        assert bool((gradient[-9:] == 1.5).all())

    def test_agrees_with_the_reference(self) -> None:
        accumulator = self.random(300_001)
        gradient = self.random(300_001, dtype=torch.bfloat16, seed=1)
        expected, statistics, sums = accumulator.clone(), self.statistics(), self.statistics()
        scale_accumulate_([accumulator], [gradient], 0.3, False, statistics)
        reference = torch.ops.sbp_fast.scale_accumulate_.reference
        reference([expected], [gradient], 0.3, False, sums)
        assert relative_error(accumulator, expected) <= tolerances.RELATIVE[torch.float32]
        assert statistics.tolist() == pytest.approx(sums.tolist(), rel=1e-6)
