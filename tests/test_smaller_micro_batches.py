"""How a step goes on where memory runs out, and what is refused."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tolerances
import torch
from out_of_memory import Failing
from reference.full_batch import assert_gradients_match, full_batch, gradients_of
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sbp_fast import StreamedAccumulator
from sbp_fast.memory import memory_budget
from sbp_fast.memory.micro_batch_size import MicroBatchSize
from sbp_fast.memory.out_of_memory import NothingSmallerError, is_out_of_memory

SAMPLES, WIDTH = 256, 32


def deep(norm: Callable[[int], nn.Module] = nn.LayerNorm) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [
        layer for _ in range(6) for layer in (nn.Linear(WIDTH, WIDTH), norm(WIDTH), nn.Tanh())
    ]
    return nn.Sequential(*layers, nn.Linear(WIDTH, 3)).double()


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(SAMPLES, WIDTH, generator=generator).double()
    return inputs, torch.randint(3, (SAMPLES,), generator=generator)


def accumulator_for(model: nn.Module, size: int = 128, **options: Any) -> StreamedAccumulator:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss_fn = options.pop("loss_fn", nn.CrossEntropyLoss())
    return StreamedAccumulator(model, optimizer, loss_fn, micro_batch_size=size, **options)


def peak_of(model: nn.Module, size: int) -> int:
    with memory_budget("cpu", None) as memory:
        memory.track(model.parameters())
        return accumulator_for(model, size, probe=False).backward(*batch()).peak_bytes or 0


def fail_half_way(accumulator: StreamedAccumulator) -> None:
    """At the allocation in the middle of those of an undisturbed step."""
    with Failing() as counting:
        accumulator.backward(*(part.clone() for part in batch()))
    with Failing(counting.allocations // 2) as memory:
        accumulator.backward(*batch())
    assert memory.failed == 1


class TestUnderABudget:
    @pytest.mark.parametrize("norm", [nn.LayerNorm, nn.BatchNorm1d])
    def test_the_step_goes_on_with_what_fits(
        self, norm: Callable[[int], nn.Module], caplog: pytest.LogCaptureFixture
    ) -> None:
        # A little more, for what the first attempt leaves: its failure is remembered.
        budget = int(1.03 * peak_of(deep(norm), 32))
        assert peak_of(deep(norm), 64) > 1.05 * budget
        model = deep(norm)
        oracle = full_batch(model, nn.CrossEntropyLoss(), *batch())
        memory = memory_budget("cpu", budget)
        memory.track(model.parameters())
        accumulator = accumulator_for(model, probe=False)
        with caplog.at_level("INFO", logger="sbp_fast"), memory:
            result = accumulator.backward(*batch())
            assert_gradients_match(
                gradients_of(model), oracle.gradients, tolerances.STEP[torch.float64]
            )
            model.zero_grad()
            again = accumulator.step(*batch())
        assert result.peak_bytes is not None
        assert result.peak_bytes <= budget
        assert result.micro_batch_size == again.micro_batch_size == 32
        assert again.micro_batches == SAMPLES // 32
        sizes = [record.getMessage().partition(":")[0] for record in caplog.records]
        assert sizes == ["micro-batch size 128 -> 64", "micro-batch size 64 -> 32"]

    def test_where_not_even_one_sample_fits_nothing_changes(self) -> None:
        model = deep()
        memory = memory_budget("cpu", peak_of(deep(), 1) // 2)
        memory.track(model.parameters())
        before = [parameter.clone() for parameter in model.parameters()]
        inputs, targets = batch()
        with (
            pytest.raises(NothingSmallerError, match="with a single sample: out of memory"),
            memory,
        ):
            accumulator_for(model, probe=False).step(inputs, targets)
        for parameter, value in zip(model.parameters(), before, strict=True):
            assert torch.equal(parameter, value)
            assert parameter.grad is None


class TestWhatIsLetGo:
    @pytest.mark.parametrize("norm", [nn.LayerNorm, nn.BatchNorm1d])
    def test_the_failed_graph(self, norm: Callable[[int], nn.Module]) -> None:
        """Before the next attempt, without the garbage collector."""
        model = deep(norm)
        outputs: list[weakref.ref[Tensor]] = []
        alive: list[int] = []

        def note(module: nn.Module, inputs: Any, output: Tensor) -> None:
            alive.append(sum(reference() is not None for reference in outputs))
            outputs.append(weakref.ref(output))

        model[0].register_forward_hook(note)
        accumulator = accumulator_for(model, SAMPLES, probe=False)
        fail_half_way(accumulator)
        # Undisturbed, whole, and its first half.
        assert alive[:3] == [0, 0, 0]


class TestRefused:
    def test_a_model_that_writes_to_its_inputs(self) -> None:
        class Centring(nn.Sequential):
            def forward(self, x: Tensor) -> Tensor:
                x -= 0.5
                return super().forward(x)

        for norm in (nn.LayerNorm, nn.BatchNorm1d):
            model = Centring(*deep(norm))
            with pytest.raises(NothingSmallerError, match="written to its inputs"):
                fail_half_way(accumulator_for(model, probe=False))

    def test_a_reentrant_checkpoint_in_backward(self) -> None:
        class Checkpointed(nn.Sequential):
            def forward(self, x: Tensor) -> Tensor:
                x = x.clone().requires_grad_()
                return checkpoint(super().forward, x, use_reentrant=True)

        model = Checkpointed(*deep())
        with pytest.raises(NothingSmallerError, match="use_reentrant=False"):
            fail_half_way(accumulator_for(model, SAMPLES, probe=False))

    def test_words_of_libraries(self) -> None:
        for error in (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"),
            RuntimeError(
                "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
            ),
            RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:116] DefaultCPUAllocator: can't allocate memory"
            ),
            MemoryError(),
        ):
            assert is_out_of_memory(error)
        for other in (
            RuntimeError("CUDA error: an illegal memory access was encountered"),
            ValueError("out of memory"),
            NothingSmallerError("out of memory"),
        ):
            assert not is_out_of_memory(other)


def test_gradients_scaled_as_they_are_added() -> None:
    """A loss in 16 bits: what has arrived was multiplied with its share."""
    inputs, targets = batch()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 3)).bfloat16()
    accumulator_for(model, SAMPLES, probe=False).backward(inputs.bfloat16(), targets)
    expected = gradients_of(model)
    survived = 0
    for number in range(12, 60, 4):
        with Failing(number) as memory:
            try:
                accumulator_for(model, SAMPLES, probe=False).backward(inputs.bfloat16(), targets)
            except torch.OutOfMemoryError:
                continue
        survived += memory.failed
        assert_gradients_match(gradients_of(model), expected, 2**-6)
    assert survived > 3


class TestSize:
    def test_halves_and_comes_back(self, caplog: pytest.LogCaptureFixture) -> None:
        size = MicroBatchSize(12)
        size.shrink(12, RuntimeError("out of memory: first line\nsecond line"))
        assert size.current == 6
        # Smaller than what is tried anyway: a piece of a stream's item.
        size.shrink(12, RuntimeError(""))
        assert size.current == 6
        size.shrink(5, RuntimeError(""))
        assert size.current == 3
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="sbp_fast"):
            steps = [steps_until_change(size) for _ in range(2)]
        assert size.current == 12
        assert steps == [100, 100]
        assert caplog.messages == [
            "micro-batch size 3 -> 6: no lack of memory for 100 steps",
            "micro-batch size 6 -> 12: no lack of memory for 100 steps",
        ]
        for _ in range(300):
            size.end_step()
        assert size.current == 12

    def test_never_below_one(self) -> None:
        size = MicroBatchSize(1)
        size.shrink(1, RuntimeError(""))
        assert size.current == 1


def steps_until_change(size: MicroBatchSize) -> int:
    before = size.current
    for steps in range(1, 1000):
        size.end_step()
        if size.current != before:
            return steps
    raise AssertionError("it does not change")


def test_streams_of_items_larger_than_what_fits() -> None:
    """Items that come after the failure are cut before they are tried."""
    model = deep()
    oracle = full_batch(model, nn.CrossEntropyLoss(), *batch())
    calls: list[int] = []
    model.register_forward_hook(lambda module, inputs, output: calls.append(len(output)))
    inputs, targets = batch()

    def stream() -> Iterator[tuple[Tensor, Tensor]]:
        yield from zip(inputs.split(128), targets.split(128), strict=True)

    with Failing(40) as memory:
        result = accumulator_for(model, probe=False).backward(stream())
    assert memory.failed == 1
    assert calls == [128, 64, 64, 64, 64]
    assert result.micro_batches == 4
    assert_gradients_match(gradients_of(model), oracle.gradients, tolerances.STEP[torch.float64])
