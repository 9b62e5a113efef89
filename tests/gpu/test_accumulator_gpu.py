"""StreamedAccumulator on a CUDA device: the same equivalences, streams, memory, and no waiting."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tolerances
import torch
from reference.full_batch import (
    assert_close,
    assert_gradients_match,
    full_batch,
    full_batch_trajectory,
    gradients_of,
    parameters_of,
)
from torch import Tensor, nn

from sbp_fast import StreamedAccumulator
from sbp_fast.ops import availability
from sbp_fast.streaming.pinned_ring import PinnedRing
from sbp_fast.transaction import Transaction

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:.*batch norm layers:UserWarning"),
]

DEVICE = "cuda"
SAMPLES, MICRO, CLASSES = 22, 4, 5
# About a tenth of a second: longer than all the rest of a test on a small model.
LATE_CYCLES = 200_000_000


@pytest.fixture(autouse=True)
def _full_precision() -> Iterator[None]:
    """TF32 rounds products to 10 bits; the tolerances are those of float32."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(params=["cuda", "triton", "reference"])
def backend(request: pytest.FixtureRequest) -> str:
    usable, reason = availability(request.param)
    if not usable:
        pytest.skip(f"backend {request.param}: {reason}")
    return str(request.param)


def conv_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.GroupNorm(2, 8),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3, stride=2),
        nn.Flatten(),
        nn.Linear(6 * 9, CLASSES),
    ).to(DEVICE)


def mlp(*, norm: bool = False) -> nn.Module:
    between: list[nn.Module] = [nn.BatchNorm1d(16)] if norm else []
    return nn.Sequential(nn.Linear(6, 16), *between, nn.Tanh(), nn.Linear(16, CLASSES)).to(DEVICE)


def images() -> tuple[Tensor, Tensor]:
    return torch.randn(SAMPLES, 3, 8, 8), labels()


def vectors() -> tuple[Tensor, Tensor]:
    return torch.randn(SAMPLES, 6), labels()


def labels() -> Tensor:
    targets = torch.randint(CLASSES, (SAMPLES,))
    targets[MICRO : 2 * MICRO] = -100  # a whole micro-batch: the mean over nothing is NaN
    targets[0] = -100
    return targets


def weighted() -> nn.CrossEntropyLoss:
    return nn.CrossEntropyLoss(torch.linspace(0.1, 9.0, CLASSES)).to(DEVICE)


def accumulator_for(model: nn.Module, loss_fn: Any = None, **options: Any) -> StreamedAccumulator:
    options.setdefault("micro_batch_size", MICRO)
    optimizer = options.pop("optimizer", None) or torch.optim.SGD(model.parameters(), lr=0.1)
    return StreamedAccumulator(model, optimizer, loss_fn or weighted(), **options)


def placed(where: str, inputs: Tensor, targets: Tensor, folder: Any) -> tuple[Any, Any]:
    if where == "pinned":
        return inputs.pin_memory(), targets.pin_memory()
    if where == "device":
        return inputs.to(DEVICE), targets.to(DEVICE)
    if where == "memmap":
        np.save(folder / "inputs.npy", inputs.numpy())
        return np.load(folder / "inputs.npy", mmap_mode="r"), targets.numpy()
    return inputs, targets


PLACES = pytest.mark.parametrize("where", ["host", "pinned", "device", "memmap"])


def check_backward(
    accumulator: StreamedAccumulator,
    model: nn.Module,
    oracle: Any,
    inputs: Any,
    targets: Any = None,
) -> None:
    bound = tolerances.STEP[next(model.parameters()).dtype]
    result = accumulator.backward(inputs, targets)
    assert_gradients_match(gradients_of(model), oracle.gradients, bound)
    for value, expected in ((result.loss, oracle.loss), (result.grad_norm, oracle.norm)):
        assert value.device.type == DEVICE
        assert_close(value, expected, bound)


class TestEquivalence:
    @pytest.mark.parametrize("micro_batch_size", [1, MICRO, SAMPLES])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
    def test_gradient(self, backend: str, micro_batch_size: int, dtype: torch.dtype) -> None:
        model, loss_fn = conv_net().to(dtype), weighted().to(dtype)
        inputs, targets = images()
        inputs = inputs.to(dtype)
        oracle = full_batch(model, loss_fn, inputs, targets)
        accumulator = accumulator_for(
            model, loss_fn, backend=backend, micro_batch_size=micro_batch_size
        )
        check_backward(accumulator, model, oracle, inputs, targets)
        check_backward(accumulator, model, oracle, inputs, targets)

    @PLACES
    def test_wherever_the_batch_lies(self, where: str, tmp_path: Any) -> None:
        model, (inputs, targets) = conv_net(), images()
        oracle = full_batch(model, weighted(), inputs, targets)
        x, y = placed(where, inputs, targets, tmp_path)
        check_backward(accumulator_for(model), model, oracle, x, y)

    def test_a_stream_of_uneven_items(self) -> None:
        model, (inputs, targets) = conv_net(), images()
        oracle = full_batch(model, weighted(), inputs, targets)
        sizes = (7, 1, 14)
        stream = zip(inputs.split(sizes), targets.split(sizes), strict=True)
        check_backward(accumulator_for(model), model, oracle, stream)

    @pytest.mark.parametrize("max_grad_norm", [1e-2, 1e3], ids=["clipped", "within"])
    def test_twenty_clipped_steps(self, backend: str, max_grad_norm: float) -> None:
        model = conv_net()
        batches = [images() for _ in range(20)]

        def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
            return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

        oracle = full_batch_trajectory(model, make_optimizer, weighted(), batches, max_grad_norm)
        accumulator = accumulator_for(
            model, optimizer=make_optimizer(model), backend=backend, max_grad_norm=max_grad_norm
        )
        losses = [accumulator.step(*batch).loss for batch in batches]
        bound = tolerances.TRAJECTORY[torch.float32]
        assert [float(loss) for loss in losses] == pytest.approx(oracle.losses, rel=bound)
        for name, value in parameters_of(model).items():
            expected = oracle.parameters[name]
            assert float((value.double().cpu() - expected).norm()) <= bound * float(expected.norm())

    def test_bfloat16_model(self, backend: str) -> None:
        model, (inputs, targets) = conv_net().bfloat16(), images()
        loss_fn = weighted().bfloat16()
        oracle = full_batch(model, loss_fn, inputs.bfloat16(), targets)
        accumulator = accumulator_for(model, loss_fn, backend=backend)
        check_backward(accumulator, model, oracle, inputs.bfloat16(), targets)
        assert all(parameter.grad.dtype == torch.bfloat16 for parameter in model.parameters())


class TestMixedPrecision:
    def test_float16_autocast_with_a_grad_scaler(self) -> None:
        model, (inputs, targets) = mlp(), vectors()
        oracle = full_batch(model, weighted(), inputs, targets)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10)
        accumulator = accumulator_for(
            model, optimizer=optimizer, autocast=torch.float16, grad_scaler=scaler
        )
        before = parameters_of(model)
        result = accumulator.step(inputs, targets)
        assert not result.skipped
        moved = {name: before[name] - value for name, value in parameters_of(model).items()}
        # float16 keeps 11 bits, bfloat16 8: the bound is generous.
        assert_gradients_match(moved, oracle.gradients, tolerances.STEP[torch.bfloat16])
        assert_close(result.grad_norm, oracle.norm, tolerances.STEP[torch.bfloat16])

    def test_an_overflow_skips_and_lowers_the_scale(self) -> None:
        model, (inputs, targets) = mlp(), vectors()
        scaler = torch.amp.GradScaler("cuda", init_scale=2.0**60, backoff_factor=2.0**-50)
        accumulator = accumulator_for(model, autocast=torch.float16, grad_scaler=scaler)
        before = parameters_of(model)
        assert accumulator.step(inputs, targets).skipped
        assert scaler.get_scale() == 2.0**10
        assert all(map(torch.equal, parameters_of(model).values(), before.values()))
        assert not accumulator.step(inputs, targets).skipped

    def test_a_skipped_step_changes_nothing(self) -> None:
        model, (inputs, targets) = mlp(norm=True), vectors()
        accumulator = accumulator_for(model)
        accumulator.step(inputs, targets)
        accumulator.backward(inputs, targets)
        state = {name: value.clone() for name, value in model.state_dict().items()}
        gradients = gradients_of(model)
        inputs[SAMPLES // 2, 0] = torch.nan
        assert accumulator.step(inputs, targets).skipped
        now = model.state_dict()
        assert all(torch.equal(now[name], value) for name, value in state.items())
        for name, gradient in gradients_of(model).items():
            assert gradient is not None
            assert torch.equal(gradient, gradients[name]), name  # type: ignore[arg-type]


class TestStreams:
    @pytest.mark.parametrize("where", ["host", "pinned", "memmap"])
    def test_copies_that_arrive_late(
        self, where: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
    ) -> None:
        """Every copy waits on the side stream. Who does not wait for it computes with what was there."""
        opened = PinnedRing.open

        def open_late(ring: PinnedRing, *, kept: bool) -> None:
            opened(ring, kept=kept)
            with torch.cuda.stream(ring._side):
                torch.cuda._sleep(LATE_CYCLES // 4)

        monkeypatch.setattr(PinnedRing, "open", open_late)
        monkeypatch.setattr("sbp_fast.accumulator.make_ring", PinnedRing)
        model, (inputs, targets) = conv_net(), images()
        oracle = full_batch(model, weighted(), inputs, targets)
        x, y = placed(where, inputs, targets, tmp_path)
        check_backward(accumulator_for(model), model, oracle, x, y)

    def test_a_computation_that_is_late(self) -> None:
        """Memory of a micro-batch that is still being read must not receive the next one."""
        model, (inputs, targets) = conv_net(), images()
        oracle = full_batch(model, weighted(), inputs, targets)
        model[0].register_forward_pre_hook(lambda *_: torch.cuda._sleep(LATE_CYCLES // 4))
        check_backward(accumulator_for(model), model, oracle, inputs, targets)

    def test_on_a_stream_of_the_callers(self) -> None:
        model, (inputs, targets) = conv_net(), images()
        oracle = full_batch(model, weighted(), inputs, targets)
        accumulator = accumulator_for(model)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.cuda._sleep(LATE_CYCLES)
            check_backward(accumulator, model, oracle, inputs, targets)

    def test_a_failed_batch_leaves_the_ring_usable(self) -> None:
        model, (inputs, targets) = conv_net(), images()
        oracle = full_batch(model, weighted(), inputs, targets)
        accumulator = accumulator_for(model)

        def broken() -> Iterator[tuple[Tensor, Tensor]]:
            yield inputs[:7], targets[:7]
            raise OSError("the disk is gone")

        for _ in range(3):
            with pytest.raises(OSError, match="the disk is gone"):
                accumulator.step(broken())
        check_backward(accumulator, model, oracle, inputs, targets)

    def test_pinned_memory_may_be_filled_again_after_backward(self) -> None:
        model, (inputs, targets) = conv_net(), images()
        oracle = full_batch(model, weighted(), inputs, targets)
        x, y = inputs.pin_memory(), targets.pin_memory()
        model[0].register_forward_pre_hook(lambda *_: torch.cuda._sleep(LATE_CYCLES // 4))
        accumulator_for(model).backward(x, y)
        x.fill_(torch.nan)
        assert_gradients_match(
            gradients_of(model), oracle.gradients, tolerances.STEP[torch.float32]
        )

    def test_a_layout_travels(self) -> None:
        rows = torch.randn(4, 3, 8, 8).to(memory_format=torch.channels_last)
        ring = PinnedRing(torch.device(DEVICE, torch.cuda.current_device()))
        ring.open(kept=False)
        arrived = ring.send(rows), ring.send(rows.pin_memory())
        ticket = ring.close()
        ring.wait_for(ticket)
        for tensor in arrived:
            assert tensor.stride() == rows.stride()
            assert torch.equal(tensor.cpu(), rows)

    @PLACES
    def test_backward_never_waits(self, where: str, backend: str, tmp_path: Any) -> None:
        model, (inputs, targets) = mlp(), vectors()
        x, y = placed(where, inputs, targets, tmp_path)
        accumulator = accumulator_for(model, backend=backend, max_grad_norm=1.0)
        accumulator.backward(x, y)  # compiles, fills the allocators, starts libraries
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            accumulator.backward(x, y)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_a_step_waits_once(self) -> None:
        model, (inputs, targets) = mlp(), vectors()
        accumulator = accumulator_for(model, max_grad_norm=1.0)
        accumulator.step(inputs, targets)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                accumulator.step(inputs, targets)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        waits = [str(warning.message) for warning in caught if "synchron" in str(warning.message)]
        assert len(waits) <= 1, waits


class TestMemory:
    def test_peak_is_far_below_the_whole_batch(self) -> None:
        model = nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU()
        ).to(DEVICE)
        inputs = torch.randn(64, 3, 64, 64)
        targets = torch.randn(64, 32, 64, 64)
        loss_fn = nn.MSELoss()
        accumulator = accumulator_for(model, loss_fn, micro_batch_size=4)
        accumulator.step(inputs, targets)  # libraries take their workspaces
        result = accumulator.step(inputs, targets)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        loss_fn(model(inputs.to(DEVICE)), targets.to(DEVICE)).backward()
        whole = torch.cuda.max_memory_allocated()
        assert result.peak_bytes is not None
        assert result.peak_bytes < whole / 4

    def test_copies_of_large_buffers_are_kept_off_the_device(self) -> None:
        module = nn.Module()
        module.register_buffer("small", torch.ones(3, device=DEVICE))
        module.register_buffer("large", torch.ones(1 << 19, device=DEVICE))
        transaction = Transaction([module], [])
        before = torch.cuda.memory_allocated()
        with transaction:
            pass
        assert torch.cuda.memory_allocated() - before < module.large.nbytes
        with pytest.raises(LookupError), transaction:  # noqa: PT012
            module.small.zero_()
            module.large.zero_()
            raise LookupError
        assert float(module.small.min()) == float(module.large.min()) == 1.0
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            with transaction:
                pass
        finally:
            torch.cuda.set_sync_debug_mode("default")
