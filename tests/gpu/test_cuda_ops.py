"""The native CUDA ops on a CUDA device: values, streams, torch.library's own checks, torch.compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.register_assert_rewrite("cuda_parity")

from cuda_parity import CudaParity, relative_error  # noqa: E402

from sbp_fast import ops  # noqa: E402

GIB = 2**30


def why_not() -> str:
    if not torch.cuda.is_available():
        return "needs a CUDA device"
    usable, reason = ops.availability("cuda")
    return "" if usable else reason


pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not() or "usable")


class TestOnCuda(CudaParity):
    device = "cuda"

    def call(self, name: str, *arguments: Any) -> None:
        getattr(torch.ops.sbp_fast, name).default(*arguments)

    # --- Streams and devices --------------------------------------------------------------------

    def test_the_current_stream_is_used(self) -> None:
        """Gradients arrive late on a side stream: a kernel on another stream would find zeros."""
        source = [self.random(100_000, seed=seed) for seed in range(20)]
        side = torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            accumulators = [torch.zeros_like(tensor) for tensor in source]
            gradients = [torch.zeros_like(tensor) for tensor in source]
            outputs = [torch.zeros_like(tensor) for tensor in source]
            statistics, half = self.statistics(), self.scalar(0.5)
            torch.cuda._sleep(200_000_000)
            for gradient, tensor in zip(gradients, source, strict=True):
                gradient.copy_(tensor)
            self.call("scale_accumulate_", accumulators, gradients, 2.0, False, statistics)
            self.call("finalise_", outputs, accumulators, half)
        side.synchronize()
        for output, tensor in zip(outputs, source, strict=True):
            assert torch.equal(output, tensor)
        assert statistics[0].item() == pytest.approx(
            sum(float(tensor.double().square().sum()) for tensor in source)
        )

    def test_calls_in_quick_succession_keep_their_tables_apart(self) -> None:
        """While the device sleeps the host runs ahead: no table may be overwritten that waits."""
        accumulators = [torch.zeros(500, device="cuda") for _ in range(40)]
        ones = [torch.ones(500, device="cuda") for _ in range(40)]
        torch.cuda._sleep(200_000_000)
        for position in range(40):
            count = position + 1
            self.call("scale_accumulate_", accumulators[:count], ones[:count], 1.0)
        for position, accumulator in enumerate(accumulators):
            assert bool((accumulator == 40 - position).all())

    def test_capture_into_a_graph_is_refused(self) -> None:
        accumulator, gradient = self.random(100), self.random(100)
        self.call("scale_accumulate_", [accumulator], [gradient], 1.0)
        with (
            pytest.raises(RuntimeError, match="call them outside the capture"),
            torch.cuda.graph(torch.cuda.CUDAGraph()),
        ):
            self.call("scale_accumulate_", [accumulator], [gradient], 1.0)
        torch.cuda.synchronize()

    def test_nothing_waits_for_the_device(self) -> None:
        accumulators = [self.random(1000) for _ in range(50)]
        gradients = [self.random(1000, dtype=torch.bfloat16) for _ in range(50)]
        statistics, scale, norm = self.statistics(), self.scalar(1.0), self.scalar(2.0)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            self.call("scale_accumulate_", accumulators, gradients, 0.5, False, statistics)
            self.call("gradient_statistics_", gradients, statistics)
            self.call("finalise_", gradients, accumulators, scale, norm, 1.0)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
    def test_tensors_on_another_device_than_the_current_one(self) -> None:
        accumulator = torch.zeros(1000, device="cuda:1")
        self.call("scale_accumulate_", [accumulator], [torch.ones_like(accumulator)], 2.0)
        assert torch.cuda.current_device() == 0
        assert torch.equal(accumulator, torch.full_like(accumulator, 2.0))

    def test_tensors_of_two_devices_are_refused(self) -> None:
        with pytest.raises(RuntimeError, match="must share one device"):
            self.call("scale_accumulate_", [self.random(3)], [torch.zeros(3)], 1.0)

    # --- Size -----------------------------------------------------------------------------------

    def test_more_than_two_to_the_31_elements(self) -> None:
        if torch.cuda.mem_get_info()[0] < 16 * GIB:
            pytest.skip("needs 16 GiB of free device memory")
        numel = 2**31 + 12345
        accumulator = torch.zeros(numel, device="cuda")
        gradient = torch.ones(numel, dtype=torch.bfloat16, device="cuda")
        statistics = self.statistics()
        self.call("scale_accumulate_", [accumulator], [gradient], 3.0, False, statistics)
        assert statistics.tolist() == [float(numel), 9.0 * numel, 0.0]
        for part in (slice(0, 9), slice(2**31 - 9, 2**31 + 9), slice(numel - 9, numel)):
            assert bool((accumulator[part] == 3.0).all())
        self.call("finalise_", [gradient], [accumulator], self.scalar(0.5))
        assert bool((gradient[-9:] == 1.5).all())

    # --- The ops as torch sees them -------------------------------------------------------------

    def test_opcheck(self) -> None:
        accumulators = [self.random(33), self.random(4, 5)]
        gradients = [self.random(33, dtype=torch.bfloat16), self.random(4, 5)]
        default = torch.ops.sbp_fast
        torch.library.opcheck(
            default.scale_accumulate_.default,
            (accumulators, gradients, 0.5, False, self.statistics()),
        )
        torch.library.opcheck(default.gradient_statistics_.default, (gradients, self.statistics()))
        torch.library.opcheck(
            default.finalise_.default,
            (gradients, accumulators, self.scalar(0.5), self.scalar(2.0), 1.0),
        )

    def test_under_torch_compile(self) -> None:
        def step(accumulator: torch.Tensor, gradient: torch.Tensor, sums: torch.Tensor) -> None:
            ops.scale_accumulate_([accumulator], [gradient * 2], 0.5, statistics=sums)

        accumulator, gradient, sums = (
            self.random(1000),
            self.random(1000, seed=1),
            self.statistics(),
        )
        oracle = accumulator.double() + gradient.double()
        torch.compile(step, fullgraph=True)(accumulator, gradient, sums)
        assert relative_error(accumulator, oracle) <= 1e-6
        assert sums[1].item() == pytest.approx(float(accumulator.double().square().sum()))

    def test_the_public_functions_choose_these_ops(self) -> None:
        assert ops.resolve("auto", "cuda") == "cuda"
        accumulator = torch.zeros(10, device="cuda")
        ops.scale_accumulate_([accumulator], [torch.ones_like(accumulator)], 3.0, backend="cuda")
        assert accumulator.tolist() == [3.0] * 10
