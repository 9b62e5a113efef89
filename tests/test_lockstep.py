"""Micro-batches that take turns: each finds the thread as it left it, and none is left behind."""

from __future__ import annotations

import copy
import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import tolerances
import torch
from reference.full_batch import (
    assert_gradients_match,
    full_batch,
    gradients_of,
    total_relative_error,
)
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from sbp_fast import HostBudgetError, StreamedAccumulator
from sbp_fast.memory import memory_budget

SAMPLES = 11
EXACT = tolerances.STEP[torch.float64]


class Wrapped(nn.Module):
    """Batch norm in the middle of whatever ``around`` does to the thread."""

    def __init__(self, around: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]) -> None:
        super().__init__()
        self.around = around
        self.first, self.norm = nn.Linear(6, 8), nn.BatchNorm1d(8)
        self.second, self.other_norm = nn.Linear(8, 8), nn.BatchNorm1d(8)
        self.last = nn.Linear(8, 1)

    def inner(self, x: Tensor) -> Tensor:
        return torch.tanh(self.other_norm(self.second(torch.tanh(self.norm(self.first(x))))))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.around(self.inner, x))


def make_batch() -> tuple[Tensor, Tensor]:
    return torch.randn(SAMPLES, 6).double(), torch.randn(SAMPLES, 1).double()


def accumulator_for(model: nn.Module, size: int = 4, **options: Any) -> StreamedAccumulator:
    return StreamedAccumulator(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        nn.MSELoss(),
        micro_batch_size=size,
        **options,
    )


class Counting(TorchDispatchMode):
    calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return func(*args, **(kwargs or {}))


class CountingFunctions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def in_hooks(inner: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        return inner(x)


def offloaded(inner: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with save_on_cpu():
        return inner(x)


def in_dispatch_mode(inner: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with Counting():
        return inner(x)


def in_function_mode(inner: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with CountingFunctions():
        return inner(x)


def checkpointed(inner: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return checkpoint(inner, x, use_reentrant=False)


def without_and_with_gradients(inner: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with torch.no_grad():
        momentum = inner(x)
        with torch.enable_grad():
            online = inner(x)
        assert not torch.is_grad_enabled()
    return online + momentum


AROUND = (
    in_hooks,
    offloaded,
    in_dispatch_mode,
    in_function_mode,
    checkpointed,
    without_and_with_gradients,
)


class TestThreadState:
    @pytest.mark.parametrize("around", AROUND, ids=lambda around: around.__name__)
    @pytest.mark.parametrize("size", [1, 4])
    def test_is_each_members_own(self, around: Any, size: int) -> None:
        model = Wrapped(around).double()
        inputs, targets = make_batch()
        expected = full_batch(model, nn.MSELoss(), inputs, targets).gradients
        accumulator_for(model, size).backward(inputs, targets)
        assert_gradients_match(gradients_of(model), expected, EXACT)

    def test_autocast_inside_of_the_model(self) -> None:
        dtypes: list[tuple[torch.dtype, torch.dtype]] = []

        def around(inner: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                h = inner(x)
                within = (x @ x.T).dtype
            dtypes.append((within, (x @ x.T).dtype))
            return h.to(x.dtype)

        model = Wrapped(around)
        inputs, targets = (part.float() for part in make_batch())
        expected = full_batch(model, nn.MSELoss(), inputs, targets).gradients
        dtypes.clear()
        accumulator_for(model, 4, probe=False).backward(inputs, targets)
        assert dtypes == [(torch.bfloat16, torch.float32)] * 3
        # In all: a bias before batch norm has no gradient but rounding errors.
        error = total_relative_error(gradients_of(model), expected)
        assert error <= tolerances.STEP[torch.bfloat16]

    def test_is_the_callers_again_afterwards(self) -> None:
        model = Wrapped(in_hooks).double()
        inputs, targets = make_batch()
        packed = []
        with (
            torch.no_grad(),
            torch.autocast("cpu", dtype=torch.bfloat16, enabled=False),
            saved_tensors_hooks(lambda t: packed.append(t), lambda t: t),
            Counting() as mode,
        ):
            accumulator_for(model).backward(inputs, targets)
            assert not torch.is_grad_enabled()
            before = mode.calls
            with torch.enable_grad():
                torch.tanh(model.last.weight)
            assert mode.calls > before
            assert len(packed) == 1

    def test_random_numbers_go_on_where_a_member_left_off(self) -> None:
        """A checkpoint draws again what its member drew, though others have drawn in between."""

        def noisy(inner: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
            def body(x: Tensor) -> Tensor:
                h = inner(x * torch.rand_like(x))
                drawn.append(torch.rand(()).item())
                return h * torch.rand_like(h)

            return checkpoint(body, x, use_reentrant=False)

        drawn: list[float] = []
        model = Wrapped(noisy).double()
        inputs, targets = make_batch()
        accumulator_for(model, probe=False).backward(inputs, targets)
        forward, again = drawn[:3], drawn[3:]
        assert len(set(forward)) == 3
        assert set(again) == set(forward)

    def test_runs_in_any_thread(self) -> None:
        model = Wrapped(checkpointed).double()
        inputs, targets = make_batch()
        expected = full_batch(model, nn.MSELoss(), inputs, targets).gradients
        models = [copy.deepcopy(model) for _ in range(3)]
        threads = [
            threading.Thread(
                target=lambda model=model: accumulator_for(model).backward(inputs, targets)
            )
            for model in models
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for one in models:
            assert_gradients_match(gradients_of(one), expected, EXACT)


class TestAbandoned:
    @pytest.mark.parametrize("failing", [0, 1, 2])
    @pytest.mark.parametrize("where", ["forward", "loss", "backward"])
    def test_members_end_in_order(self, failing: int, where: str) -> None:
        open_contexts: list[int] = []
        calls = iter(range(100))

        @contextmanager
        def resource() -> Iterator[None]:
            open_contexts.append(1)
            try:
                yield
            finally:
                open_contexts.pop()

        class Fail(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor) -> Tensor:
                return x.clone()

            @staticmethod
            def backward(ctx: Any, gradient: Tensor) -> Tensor:
                if where == "backward" and next(calls) == failing:
                    raise ZeroDivisionError
                return gradient

        def around(inner: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
            with resource():
                h = inner(x)
                if where == "forward" and next(calls) == failing:
                    raise ZeroDivisionError
                return Fail.apply(h)

        def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
            if where == "loss" and next(calls) == failing:
                raise ZeroDivisionError
            return (outputs - targets).square().mean()

        model = Wrapped(around).double()
        accumulator = StreamedAccumulator(
            model,
            torch.optim.SGD(model.parameters(), lr=0.1),
            loss_fn,
            micro_batch_size=4,
            normalization="mean",
            probe=False,
        )
        inputs, targets = make_batch()
        before = copy.deepcopy(model.state_dict())
        norm = nn.functional.batch_norm
        random_state = torch.get_rng_state()
        with pytest.raises(ZeroDivisionError):
            accumulator.step(inputs, targets)
        assert open_contexts == []
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
        assert all(parameter.grad is None for parameter in model.parameters())
        assert nn.functional.batch_norm is norm
        assert torch.equal(torch.get_rng_state(), random_state)
        # And the next step is a whole one.
        calls = iter(range(100, 200))
        expected = full_batch(model, loss_fn, inputs, targets).gradients
        accumulator.backward(inputs, targets)
        assert_gradients_match(gradients_of(model), expected, EXACT)


class TestWaiting:
    def model(self) -> nn.Module:
        return nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
                )
                for _ in range(8)
            ),
            nn.Flatten(),
            nn.Linear(4 * 256, 1),
        ).double()

    def test_is_reported_apart_from_the_device(self) -> None:
        """The more samples, the more waits; the device holds no more for it."""
        peaks, waiting = [], []
        for samples in (8, 16, 32):
            model = self.model()
            inputs, targets = (
                torch.randn(samples, 4, 16, 16).double(),
                torch.randn(samples, 1).double(),
            )
            accumulator = accumulator_for(model, 4)
            with memory_budget(torch.device("cpu"), "1GiB") as memory:
                memory.track(model.parameters())
                result = accumulator.backward(inputs, targets)
            peaks.append(result.peak_bytes)
            waiting.append(result.host_bytes)
        assert peaks[2] <= 1.02 * peaks[0]
        assert waiting[2] == pytest.approx(4 * waiting[0], rel=0.2)

    def test_nothing_waits_where_nothing_meets(self) -> None:
        model = nn.Linear(6, 1).double()
        assert accumulator_for(model).backward(*make_batch()).host_bytes == 0

    def test_files_take_what_is_beyond_the_budget(self, tmp_path: Any) -> None:
        model = self.model()
        inputs, targets = torch.randn(12, 4, 16, 16).double(), torch.randn(12, 1).double()
        expected = full_batch(model, nn.MSELoss(), inputs, targets).gradients
        needed = accumulator_for(model, 4).backward(inputs, targets).host_bytes
        result = accumulator_for(
            model, 4, host_budget=needed // 3, spill_directory=tmp_path
        ).backward(inputs, targets)
        assert_gradients_match(gradients_of(model), expected, EXACT)
        assert result.host_bytes <= needed // 3
        assert result.host_bytes + result.spilled_bytes >= needed // 2
        assert list(tmp_path.iterdir()) == []

    def test_what_will_wait_is_known_before(self, tmp_path: Any) -> None:
        model = self.model()
        inputs, targets = torch.randn(12, 4, 16, 16).double(), torch.randn(12, 1).double()
        needed = accumulator_for(model, 4).backward(inputs, targets).host_bytes
        calls = []
        model.register_forward_hook(lambda *_: calls.append(1))
        before = copy.deepcopy(model.state_dict())
        accumulator = accumulator_for(model, 4, host_budget=needed // 2, probe=False)
        with pytest.raises(HostBudgetError, match=r"12 samples.*enough for [4-6] samples"):
            accumulator.step(inputs, targets)
        assert len(calls) == 1
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
        accumulator.step(inputs[:5], targets[:5])
        accumulator = accumulator_for(model, 4, host_budget=int(1.2 * needed))
        assert accumulator.step(inputs, targets).host_bytes <= 1.2 * needed

    def test_of_a_stream_is_bounded_as_it_comes(self) -> None:
        model = self.model()
        inputs, targets = torch.randn(12, 4, 16, 16).double(), torch.randn(12, 1).double()
        needed = accumulator_for(model, 4).backward(inputs, targets).host_bytes
        before = copy.deepcopy(model.state_dict())
        accumulator = accumulator_for(model, 4, host_budget=needed // 2)
        pairs = ((inputs[i : i + 4], targets[i : i + 4]) for i in range(0, 12, 4))
        with pytest.raises(HostBudgetError, match="host_budget is"):
            accumulator.step(pairs)
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("micro_batch_size", [4, SAMPLES])
def test_a_large_batch_goes_when_its_step_does(micro_batch_size: int) -> None:
    """No cycle keeps its statistics until the garbage collector comes by."""
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    accumulator = StreamedAccumulator(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        nn.CrossEntropyLoss(),
        micro_batch_size=micro_batch_size,
    )
    inputs, targets = torch.randn(SAMPLES, 6), torch.randint(3, (SAMPLES,))
    accumulator.step(inputs, targets)
    gc.collect()
    gc.disable()
    try:
        with memory_budget("cpu", None) as memory:
            accumulator.step(inputs, targets)
            assert memory.live_bytes == 0
    finally:
        gc.enable()
