"""``activations="offload"``: what goes to the host, when it is back, and in which order copies happen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tolerances
import torch
from reference.full_batch import assert_gradients_match, gradients_of
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from unchanged import State

from sbp_fast import StreamedAccumulator
from sbp_fast.activations.offload import Lane, OffloadStore
from sbp_fast.activations.pinned_pool import PinnedPool, size_class
from sbp_fast.memory import LiveBytes, memory_budget

CPU = torch.device("cpu")
KIB = 1 << 10
ROWS, WIDTH = 64, 256  # 64 KiB a tensor


class Late:
    """An event of :class:`LateLane`."""

    def __init__(self, copy: Callable[[], None], lane: LateLane) -> None:
        self.copy, self.lane, self.done = copy, lane, False

    def query(self) -> bool:
        return self.done


class LateLane(Lane):
    """Makes no copy before somebody waits for it: whoever does not wait finds what was there before."""

    def __init__(self) -> None:
        self.device = CPU
        self.pool = UnpinnedPool()
        self.queue: list[Late] = []
        self.copies = 0

    def copy(self, target: Tensor, source: Tensor) -> Any:
        self.copies += 1

        def copy() -> None:
            assert target.untyped_storage().nbytes() >= target.nbytes, "its memory is gone"
            assert source.untyped_storage().nbytes() >= source.nbytes, "its memory is gone"
            target.copy_(source)

        if target.untyped_storage()._cdata not in self.pool.all:
            target.fill_(255)  # memory that was allocated for it holds anything
        event = Late(copy, self)
        self.queue.append(event)
        return event

    def wait_for(self, event: Any) -> None:
        while not event.done:
            first = self.queue.pop(0)
            first.copy()
            first.done = True

    def join(self) -> None:
        while self.queue:
            self.wait_for(self.queue[0])


class UnpinnedPool(PinnedPool):
    def __init__(self) -> None:
        super().__init__()
        self.all: dict[int, Tensor] = {}

    def _allocate(self, nbytes: int) -> Tensor:
        memory = torch.empty(nbytes, dtype=torch.uint8)
        self.all[memory.untyped_storage()._cdata] = memory
        return memory


LANES = pytest.mark.parametrize("lane", [None, LateLane], ids=["account", "late copies"])


def make_store(
    lane: Callable[[], Lane] | None = None,
    budget: int | None = None,
    counter: LiveBytes | None = None,
) -> OffloadStore:
    return OffloadStore(CPU, budget, counter, None if lane is None else lane())


def matrix() -> Tensor:
    return torch.randn(ROWS, WIDTH)


class Net(nn.Module):
    """Deep, with a skip over everything, in-place activations, and tensors that are saved twice."""

    def __init__(self, layers: int = 6) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        skip = x
        for position, layer in enumerate(self.layers):
            x = layer(x)
            x = torch.relu_(x) if position % 2 else torch.sigmoid(x) * x
        return x + skip.exp()


def gradients_with(store: OffloadStore | None, model: nn.Module, inputs: Tensor) -> list[Tensor]:
    inputs = inputs.clone().requires_grad_()
    if store is None:
        model(inputs).square().sum().backward()
    else:
        store.leave_alone(model.parameters())
        with saved_tensors_hooks(store.hold, store.take):
            model(inputs).square().sum().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    return [*gradients, inputs.grad]  # type: ignore[list-item]


class TestSameGradients:
    @LANES
    def test_of_every_parameter_and_of_the_inputs(self, lane: Any) -> None:
        model, inputs = Net(), matrix()
        expected = gradients_with(None, model, inputs)
        store = make_store(lane)
        for _ in range(3):
            assert all(map(torch.equal, gradients_with(store, model, inputs), expected))
        assert store.peak_host_bytes > 8 * inputs.nbytes
        assert store.host_bytes == 0

    @LANES
    def test_of_a_graph_that_is_run_twice(self, lane: Any) -> None:
        store = make_store(lane)
        x = matrix().requires_grad_()
        with saved_tensors_hooks(store.hold, store.take):
            y = x.exp().sin().exp().sum()
        (first,) = torch.autograd.grad(y, x, retain_graph=True)
        (second,) = torch.autograd.grad(y, x)
        assert torch.equal(first, second)
        assert torch.equal(first, torch.autograd.grad(x.exp().sin().exp().sum(), x)[0])

    @LANES
    def test_of_gradients(self, lane: Any) -> None:
        """A penalty on gradients: what its inner backward pass saves is wanted at once."""

        def penalty(x: Tensor) -> Tensor:
            (gradient,) = torch.autograd.grad(x.sigmoid().sin().sum(), x, create_graph=True)
            return gradient.square().sum()

        x = matrix().requires_grad_()
        (expected,) = torch.autograd.grad(penalty(x), x)
        store = make_store(lane)
        with saved_tensors_hooks(store.hold, store.take):
            value = penalty(x)
        assert torch.equal(torch.autograd.grad(value, x)[0], expected)

    def test_what_is_saved_in_a_backward_pass_stays(self) -> None:
        store, held = make_store(), []
        x = matrix().requires_grad_()
        y = x * 2.0
        y.register_hook(lambda _: held.append(store.hold(matrix())))
        y.sum().backward()
        assert [one.slot for one in held] == [None]

    def test_strides_and_offsets(self) -> None:
        store = make_store(LateLane)
        whole = torch.randn(4, ROWS, WIDTH)
        views = [whole[1].t(), whole[2, ::2], whole.permute(2, 0, 1)[5:]]
        copies = [view.clone() for view in views]
        held = [store.hold(view) for view in views]
        del whole, views
        store.send_unshared()
        assert store.host_bytes == 4 * ROWS * WIDTH * 4
        for one, copy in zip(held, copies, strict=True):
            assert torch.equal(store.take(one), copy)
        assert store.host_bytes == 0


class TestWhatTravels:
    def test_what_somebody_still_has_stays(self) -> None:
        store = make_store()
        mine = matrix()
        held = store.hold(mine)
        store.send_unshared()
        assert store.host_bytes == 0
        del mine
        store.send_unshared()
        assert store.host_bytes == ROWS * WIDTH * 4
        del held
        assert store.host_bytes == 0

    def test_small_tensors_stay(self) -> None:
        store = make_store()
        held = store.hold(torch.randn(1000))
        store.send_unshared()
        assert (store.host_bytes, held.slot) == (0, None)

    def test_what_is_beyond_the_budget_stays(self) -> None:
        store = make_store(budget=3 * 64 * KIB + 5)
        held = [store.hold(matrix()) for _ in range(5)]
        store.send_unshared()
        assert store.host_bytes == 3 * 64 * KIB
        held.clear()
        assert store.host_bytes == 0

    @LANES
    def test_two_are_brought_back_ahead(self, lane: Any) -> None:
        store = make_store(lane)
        held = [store.hold(matrix()) for _ in range(6)]
        store.send_unshared()
        assert store.host_bytes == 6 * 64 * KIB
        store.take(held.pop())
        assert store.host_bytes == 3 * 64 * KIB
        store.take(held.pop())
        assert store.host_bytes == 2 * 64 * KIB

    @LANES
    def test_a_changed_tensor_is_refused(self, lane: Any) -> None:
        store = make_store(lane)
        x = matrix().requires_grad_()
        with saved_tensors_hooks(store.hold, store.take):
            y = x.exp()
            z = y.sin()
            y.mul_(2.0)
            loss = (y * z).sum()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    def test_the_account_of_a_limited_device(self) -> None:
        """Twelve tensors of 64 KiB pass through a device that has room for seven and some scalars: the
        leaf, what is wanted now and two ahead, the gradient, and what becomes of it."""
        with LiveBytes(limit_bytes=7 * 64 * KIB + 64) as counter:
            store = make_store(counter=counter)
            x = torch.ones(ROWS, WIDTH, requires_grad=True)
            with saved_tensors_hooks(store.hold, store.take):
                y = x
                for _ in range(12):
                    y = y.sin()
                loss = y.sum()
            del y
            loss.backward()
            assert store.peak_host_bytes >= 10 * 64 * KIB


class TestCopies:
    def test_memory_is_pinned_once(self) -> None:
        lane = LateLane()
        store = OffloadStore(CPU, None, None, lane)
        model, inputs = Net(), matrix()
        gradients_with(store, model, inputs)
        allocated = lane.pool.nbytes
        assert allocated > 0
        for _ in range(3):
            gradients_with(OffloadStore(CPU, None, None, lane), model, inputs)
        assert lane.pool.nbytes == allocated

    def test_what_is_dropped_on_its_way_back_waits_for_its_copy(self) -> None:
        """Its memory goes to somebody else then."""
        lane = LateLane()
        store = OffloadStore(CPU, None, None, lane)
        held = [store.hold(matrix()) for _ in range(4)]
        store.send_unshared()
        lane.join()
        store._free_what_has_left(lane)
        store.take(held.pop())
        assert len(lane.queue) == 2
        held.clear()
        assert lane.queue == []
        assert store.host_bytes == 0

    def test_what_is_wanted_before_it_has_left_never_leaves(self) -> None:
        lane = LateLane()
        store = OffloadStore(CPU, None, None, lane)
        tensor = matrix()
        copy, held = tensor.clone(), store.hold(tensor)
        del tensor
        store.send_unshared()
        assert torch.equal(store.take(held), copy)
        assert lane.copies == 1
        lane.join()
        store._free_what_has_left(lane)
        assert torch.equal(store.take(held), copy)

    def test_few_are_on_their_way_out_at_once(self) -> None:
        lane = LateLane()
        store = OffloadStore(CPU, None, None, lane)
        held = [store.hold(matrix()) for _ in range(7)]
        store.send_unshared()
        assert len(lane.queue) == 2
        assert len(held) == 7

    def test_sizes(self) -> None:
        for nbytes in (1, 4096, 4097, 100_000, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 3_000_001):
            assert nbytes <= size_class(nbytes) <= max(4096, nbytes * 9 / 8 + 4096)
            assert size_class(size_class(nbytes)) == size_class(nbytes)


class TestSteps:
    def accumulator(self, model: nn.Module, **options: Any) -> StreamedAccumulator:
        options.setdefault("activations", "offload")
        return StreamedAccumulator(
            model,
            torch.optim.SGD(model.parameters(), lr=0.01),
            nn.MSELoss(),
            micro_batch_size=ROWS,
            **options,
        )

    def test_parameters_buffers_and_micro_batches_stay(self) -> None:
        class Table(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight = nn.Parameter(matrix())
                self.register_buffer("table", matrix())

            def forward(self, x: Tensor) -> Tensor:
                return x * self.weight.view(-1).view(ROWS, WIDTH) * self.table[:]

        # Of the products, one is saved, and by the loss the difference from the targets.
        inputs, targets = torch.randn(3 * ROWS, WIDTH), torch.randn(3 * ROWS, WIDTH)
        result = self.accumulator(Table()).backward(inputs, targets)
        assert result.host_bytes <= 2 * 64 * KIB

    def test_what_waits_is_reported(self) -> None:
        model, inputs = Net(), torch.randn(3 * ROWS, WIDTH)
        accumulator = self.accumulator(model)
        with memory_budget("cpu", None) as memory:
            memory.track(model.parameters())
            result = accumulator.backward(inputs, inputs)
        # Of the even layers their outputs, sigmoids and products, of the odd ones the activations.
        assert 8 * 64 * KIB <= result.host_bytes <= 12 * 64 * KIB
        kept = self.accumulator(model, activations="keep").backward(inputs, inputs)
        assert (kept.host_bytes, kept.spilled_bytes) == (0, 0)

    def test_a_budget_for_the_host(self) -> None:
        model, inputs = Net(), torch.randn(3 * ROWS, WIDTH)
        self.accumulator(model, activations="keep").backward(inputs, inputs)
        expected = gradients_of(model)
        result = self.accumulator(model, host_budget="200KiB").backward(inputs, inputs)
        assert 0 < result.host_bytes <= 200 * KIB
        assert_gradients_match(gradients_of(model), expected, 0.0)

    def test_exact_batch_norm_has_its_own_way(self) -> None:
        model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Tanh())
        inputs = torch.randn(3 * ROWS, WIDTH)
        waiting = [
            self.accumulator(model, activations=activations).backward(inputs, inputs).host_bytes
            for activations in ("keep", "offload")
        ]
        assert waiting[0] == waiting[1] > 0

    def test_a_compiled_model(self) -> None:
        model, inputs = Net(2), torch.randn(2 * ROWS, WIDTH)
        self.accumulator(model, activations="keep").backward(inputs, inputs)
        expected = gradients_of(model)
        compiled = torch.compile(model, backend="aot_eager")
        result = self.accumulator(compiled).backward(inputs, inputs)  # type: ignore[arg-type]
        assert result.host_bytes > 0
        assert_gradients_match(gradients_of(model), expected, tolerances.STEP[torch.float32])

    def test_an_exception(self) -> None:
        class Raising(Net):
            armed = False

            def forward(self, x: Tensor) -> Tensor:
                x = super().forward(x)
                if self.armed:
                    raise LookupError("mine")
                return x

        model, inputs = Raising(), torch.randn(3 * ROWS, WIDTH)
        accumulator = self.accumulator(model)
        accumulator.step(inputs, inputs)
        state = State(model, accumulator._optimizer)
        model.armed = True
        with pytest.raises(LookupError, match="mine"):
            accumulator.step(inputs, inputs)
        state.check()
        model.armed = False
        assert not accumulator.step(inputs, inputs).skipped
