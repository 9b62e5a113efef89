"""The batch norm ops on a CUDA device, native and compiled by Triton: values, streams, size."""

from __future__ import annotations

import os
from typing import Any

import pytest
import tolerances
import torch
from torch import Tensor

pytest.register_assert_rewrite("batch_norm_parity")

from batch_norm_parity import BatchNormParity, channels_last  # noqa: E402

from sbp_fast import ops  # noqa: E402
from sbp_fast.ops import triton_backend, triton_batch_norm  # noqa: E402, F401

GIB = 2**30


def why_not(backend: str) -> str:
    if not torch.cuda.is_available():
        return "needs a CUDA device"
    if backend == "triton" and os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        return "TRITON_INTERPRET=1 is set; unset it to test compiled kernels"
    usable, reason = ops.availability(backend)
    return "" if usable else reason


def needs(backend: str) -> pytest.MarkDecorator:
    reason = why_not(backend)
    return pytest.mark.skipif(bool(reason), reason=reason or "usable")


class OnCuda(BatchNormParity):
    device = "cuda"

    def all_four(self, input: Tensor, grad_output: Tensor, coefficients: Tensor) -> list[Tensor]:
        return [
            self.call("batch_norm_statistics", input),
            self.call("batch_norm_normalise", input, coefficients[:3]),
            self.call("batch_norm_backward_statistics", grad_output, input, coefficients[:2]),
            self.call("batch_norm_backward_apply", grad_output, input, coefficients),
        ]

    @pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
    def test_a_side_stream_is_used_and_waited_for(self, layout: torch.memory_format) -> None:
        """The input arrives late on a side stream: work on another stream would find zeros."""
        source = self.random(8, 64, 56, 56).contiguous(memory_format=layout)
        coefficients = self.coefficients(source, 4)
        expected = self.all_four(source, source, coefficients)  # compiles, too
        side = torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            input = torch.zeros_like(source)
            torch.cuda._sleep(200_000_000)
            input.copy_(source)
            results = self.all_four(input, input, coefficients)
        side.synchronize()
        assert all(map(torch.equal, results, expected))

    def test_nothing_waits_for_the_device(self) -> None:
        input, grad_output = self.random(4, 8, 30, 30), self.random(4, 8, 30, 30, seed=1)
        coefficients = self.coefficients(input, 4)
        copied = channels_last(grad_output)  # which is brought into the input's layout
        self.all_four(input, copied, coefficients)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            self.all_four(input, copied, coefficients)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
    def test_tensors_on_another_device_than_the_current_one(self) -> None:
        input = self.random(4, 8, 30, 30)
        coefficients = self.coefficients(input, 4)
        expected = self.all_four(input, input, coefficients)
        moved = input.to("cuda:1")
        results = self.all_four(moved, moved, coefficients.to("cuda:1"))
        assert all(result.device == moved.device for result in results)
        assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(results, expected, strict=True))

    @pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize(
        "shape", [(32, 64, 112, 112), (32, 256, 56, 56), (32, 2048, 7, 7), (1, 3, 1024, 1024)]
    )
    def test_as_large_as_a_network_has_them(
        self, shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format
    ) -> None:
        input = torch.randn(shape, device="cuda", dtype=dtype) * 3 + 100
        grad_output = torch.randn(shape, device="cuda", dtype=dtype)
        input = input.contiguous(memory_format=layout)
        grad_output = grad_output.contiguous(memory_format=layout)
        self.check_statistics(input)
        self.check_normalise(input)
        self.check_backward_statistics(grad_output, input)
        self.check_backward_apply(grad_output, input)

    @pytest.mark.parametrize(
        "shape", [(2**31 // 6 + 99, 3, 2), (2**31 // 3 + 99, 3), (1, 1, 2**31 + 99)]
    )
    def test_more_than_two_to_the_31_elements(self, shape: tuple[int, ...]) -> None:
        if torch.cuda.mem_get_info()[0] < 24 * GIB:
            pytest.skip("needs 24 GiB of free device memory")
        input = torch.ones(shape, device="cuda", dtype=torch.bfloat16)
        input.view(-1)[-1] = 3.0  # of the last channel
        count = input.numel() // shape[1]
        mean, squares = self.call("batch_norm_statistics", input)
        bound = tolerances.CHANNEL_SUMS[torch.bfloat16]
        assert mean[-1].item() == pytest.approx(1.0 + 2.0 / count, rel=1e-12)
        assert squares[-1].item() == pytest.approx(4.0 * (1.0 - 1.0 / count), rel=bound)
        assert mean[:-1].tolist() == [1.0] * (shape[1] - 1)
        assert squares[:-1].tolist() == [0.0] * (shape[1] - 1)
        coefficients = torch.ones(4, shape[1], dtype=torch.float64, device="cuda")
        sums = self.call("batch_norm_backward_statistics", input, input, coefficients[:2])
        assert sums[0, -1].item() == count + 2.0
        assert sums[1, -1].item() == 6.0
        output = self.call("batch_norm_normalise", input, coefficients[:3])
        assert output.view(-1)[-1].item() == 3.0
        assert output.view(-1)[2**31 - 9 : 2**31 + 9].tolist() == [1.0] * 18
        del output
        output = self.call("batch_norm_backward_apply", input, input, coefficients)
        assert output.view(-1)[-1].item() == 6.0
        assert output.view(-1)[2**31 - 9 : 2**31 + 9].tolist() == [2.0] * 18


@needs("cuda")
class TestNative(OnCuda):
    def call(self, name: str, *arguments: Any) -> Tensor:
        result: Tensor = getattr(torch.ops.sbp_fast, name).default(*arguments)
        return result

    def test_the_public_functions_choose_these_ops(self) -> None:
        input = self.random(3, 5, 6, 8)
        assert ops.resolve("auto", "cuda") == "cuda"
        chosen = ops.batch_norm_statistics(input, backend="cuda")
        assert torch.equal(chosen, self.call("batch_norm_statistics", input))


@needs("triton")
class TestTriton(OnCuda):
    def walked(self, walk: str, dtype: torch.dtype, seed: int = 0) -> Tensor:
        if dtype in (torch.float64, torch.float16) and walk not in ("images", "channels last"):
            pytest.skip("compiling takes long: other dtypes walk here")
        return super().walked(walk, dtype, seed)

    def call(self, name: str, *arguments: Any) -> Tensor:
        result: Tensor = getattr(torch.ops.sbp_fast, name).triton(*arguments)
        return result
