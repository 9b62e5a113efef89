"""Dropout on a CUDA device, natively and in compiled Triton: masks, streams, sizes, torch's checks."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import philox_oracle
import pytest
import torch
from torch import Tensor

pytest.register_assert_rewrite("dropout_parity")

from dropout_parity import CALL, FIRST_SAMPLE, PROBABILITY, SEED, DropoutParity  # noqa: E402

from sbp_fast import ops  # noqa: E402

GIB = 2**30


def why_not(backend: str) -> str:
    if not torch.cuda.is_available():
        return "needs a CUDA device"
    if backend == "triton" and os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        return "TRITON_INTERPRET=1 is set; unset it to test compiled kernels"
    usable, reason = ops.availability(backend)
    return "" if usable else reason


class OnCuda(DropoutParity):
    device = "cuda"
    overload: str

    def call(self, input: Tensor, *arguments: Any) -> Tensor:
        result: Tensor = getattr(torch.ops.sbp_fast.dropout, self.overload)(input, *arguments)
        return result

    def test_the_current_stream_is_used(self) -> None:
        """What is dropped arrives late on a side stream: a kernel on another one would find zeros."""
        source = self.random(4, 100_000)
        arguments = (SEED, CALL, FIRST_SAMPLE, 1, 4, PROBABILITY)
        expected = self.call(source, *arguments)
        side = torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            late = torch.zeros_like(source)
            torch.cuda._sleep(200_000_000)
            late.copy_(source)
            result = self.call(late, *arguments)
        side.synchronize()
        assert torch.equal(result, expected)

    def test_nothing_waits_for_the_device(self) -> None:
        image = self.random(2, 16, 8, 8)
        inputs = [self.random(2, 1000), image, image.to(memory_format=torch.channels_last)]
        for input in inputs:
            self.call(input, 1, 2, 3, 1, 2, 0.5)  # compiles, and fills the allocators
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for input in inputs:
                self.call(input, 1, 2, 3, 1, 2, 0.5)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
    def test_tensors_on_another_device_than_the_current_one(self) -> None:
        input = torch.ones(2, 500, device="cuda:1")
        result = self.call(input, 1, 2, 3, 1, 2, 0.5)
        assert torch.equal(result.cpu(), self.call(input.to("cuda:0"), 1, 2, 3, 1, 2, 0.5).cpu())

    @pytest.mark.parametrize("samples", [1, 2])
    def test_more_than_two_to_the_31_elements(self, samples: int) -> None:
        if torch.cuda.mem_get_info()[0] < 16 * GIB:
            pytest.skip("needs 16 GiB of free device memory")
        inner = (2**31 + 4096) // samples
        result = self.call(
            torch.ones(samples, inner, dtype=torch.bfloat16, device="cuda"),
            *(SEED, CALL, FIRST_SAMPLE, 1, samples, PROBABILITY),
        )
        last = np.array([FIRST_SAMPLE + samples - 1])
        for first in (0, inner // 2, inner - 5000):
            words = philox_oracle.noise(SEED, CALL, last, np.arange(first, first + 5000))
            keep = torch.from_numpy(words >= np.uint64(round(PROBABILITY * 2**32)))[0]
            assert torch.equal(result[-1, first : first + 5000].cpu() != 0, keep)

    def test_opcheck(self) -> None:
        op = getattr(torch.ops.sbp_fast.dropout, self.overload)
        torch.library.opcheck(op, (self.random(2, 33), 1, 2, 3, 1, 2, 0.5))

    def test_agrees_with_the_cpu(self) -> None:
        image = self.random(3, 40, 30, 30)
        arguments = (SEED, CALL, FIRST_SAMPLE, 1, 3, PROBABILITY)
        for input in (image, image.to(memory_format=torch.channels_last)):
            theirs = torch.ops.sbp_fast.dropout.reference(input.cpu(), *arguments)
            assert torch.equal(self.call(input, *arguments).cpu(), theirs)


@pytest.mark.skipif(bool(why_not("cuda")), reason=why_not("cuda") or "usable")
class TestNative(OnCuda):
    overload = "default"

    def test_the_public_function_chooses_this_op(self) -> None:
        input = self.random(2, 40)
        options: dict[str, Any] = {"seed": 1, "call": 2, "first_sample": 3, "samples": 2}
        assert ops.resolve("auto", "cuda") == "cuda"
        assert torch.equal(ops.dropout(input, 0.5, **options), self.call(input, 1, 2, 3, 1, 2, 0.5))


@pytest.mark.skipif(bool(why_not("triton")), reason=why_not("triton") or "usable")
class TestTriton(OnCuda):
    overload = "triton"
