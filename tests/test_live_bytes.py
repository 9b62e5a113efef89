"""The count of live bytes is exact, and its limit leaves nothing behind."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from sbp_fast import StreamedAccumulator
from sbp_fast.memory import LiveBytes

FLOAT = 4


def test_counts_what_is_made_and_forgets_what_is_freed() -> None:
    with LiveBytes() as counter:
        first = torch.zeros(1000)
        assert counter.live_bytes == 1000 * FLOAT
        second = torch.zeros(10, dtype=torch.float64)
        assert counter.live_bytes == 1000 * FLOAT + 80
        del first
        assert counter.live_bytes == 80
        assert counter.peak_bytes == 1000 * FLOAT + 80
        counter.reset_peak()
        assert counter.peak_bytes == 80
    del second
    assert counter.live_bytes == 0, "freed outside of the block"


def test_views_and_in_place_operations_cost_nothing() -> None:
    with LiveBytes() as counter:
        tensor = torch.zeros(8, 100)
        size = counter.live_bytes
        views = [tensor[1], tensor.t(), tensor.view(-1), tensor.detach(), *tensor.split(2)]
        tensor.add_(1).mul_(2)
        torch._foreach_add_(views[:2], 1.0)
        torch.add(tensor, 1, out=tensor)
        assert counter.live_bytes == counter.peak_bytes == size == 800 * FLOAT
        del tensor
        assert counter.live_bytes == size, "the views keep the storage"
        views.clear()
        assert counter.live_bytes == 0


def test_lists_of_results_are_counted() -> None:
    with LiveBytes() as counter:
        products = torch._foreach_mul([torch.zeros(10), torch.zeros(20)], 2.0)
        assert counter.live_bytes == 30 * FLOAT
        values, indices = products[1].sort()
        assert counter.live_bytes == 30 * FLOAT + values.nbytes + indices.nbytes


def test_host_memory_is_not_counted_but_copies_of_it_are() -> None:
    host = torch.zeros(100)
    with LiveBytes() as counter:
        views = [host[10:], host.reshape(10, 10), host.to(torch.float32), host.expand(3, 100)]
        # A view that its schema does not declare.
        views.append(torch.ops.aten._unsafe_view(host, [10, 10]))
        assert all(view.untyped_storage()._cdata == host.untyped_storage()._cdata for view in views)
        assert counter.live_bytes == 0
        copy = host.clone()
        assert counter.live_bytes == copy.nbytes


def test_copies_by_composite_operations_are_counted_in_inference_mode() -> None:
    host = torch.zeros(100)
    with torch.inference_mode(), LiveBytes() as counter:
        same = host.to(torch.float32)
        assert counter.live_bytes == 0
        wide = host.to(torch.float64)
        assert counter.live_bytes == wide.nbytes
    assert same.data_ptr() == host.data_ptr()


def test_resized_storage_counts_with_its_new_size() -> None:
    with LiveBytes(1000 * FLOAT) as counter:
        result = torch.empty(0)
        torch.add(torch.zeros(100), 1, out=result)
        assert counter.live_bytes == 100 * FLOAT
        result.resize_(50)
        assert counter.live_bytes == 100 * FLOAT, "resize_ keeps memory that it has"
        result.resize_(200)
        assert counter.live_bytes == 200 * FLOAT
        with pytest.raises(torch.OutOfMemoryError):
            result.resize_(1001)


def test_tracked_tensors_count_once() -> None:
    weight = torch.zeros(50)
    counter = LiveBytes(60 * FLOAT)
    counter.track([weight, weight, weight[:10]])
    counter.track([weight])
    assert counter.live_bytes == counter.peak_bytes == 50 * FLOAT
    with pytest.raises(torch.OutOfMemoryError):
        counter.track([torch.zeros(11)])
    assert counter.live_bytes == 50 * FLOAT
    del weight
    assert counter.live_bytes == 0


def test_what_autograd_saves_is_counted_until_backward() -> None:
    weight = torch.zeros(256, requires_grad=True)
    counter = LiveBytes()
    counter.track([weight])
    one = 256 * FLOAT
    with counter:
        # exp saves its result; square saves its argument, the same tensor; the square itself goes.
        loss = weight.exp().square().sum()
        assert counter.live_bytes == 2 * one + FLOAT
        loss.backward()
        assert counter.live_bytes == 2 * one + FLOAT, "saved: freed; the gradient: new"
        weight.grad = None
        assert counter.live_bytes == one + FLOAT


def test_the_limit_itself_is_allowed_and_no_byte_more() -> None:
    with LiveBytes(1000) as counter:
        kept = torch.zeros(600, dtype=torch.uint8)
        with pytest.raises(torch.OutOfMemoryError) as caught:
            torch.zeros(401, dtype=torch.uint8)
        message = str(caught.value)
        for part in ("aten.zeros", "401 B", "600 B", "1000 B", "smaller micro-batch"):
            assert part in message
        assert counter.live_bytes == counter.peak_bytes == 600, "the refused tensor left no trace"
        rest = torch.zeros(400, dtype=torch.uint8)
        assert counter.live_bytes == counter.peak_bytes == 1000
        with pytest.raises(torch.OutOfMemoryError):
            kept.clone()
        rest.add_(1)
    torch.zeros(2000)


def test_the_error_s_traceback_does_not_hold_what_was_refused() -> None:
    with LiveBytes() as everything, LiveBytes(1500) as counter:
        kept = torch.zeros(100, dtype=torch.float64)
        with pytest.raises(torch.OutOfMemoryError) as caught:
            kept.neg().sort()
        assert caught.traceback
        assert everything.live_bytes == counter.live_bytes == kept.nbytes


def test_several_results_of_one_operation_are_refused_together() -> None:
    inputs = torch.zeros(100)
    with LiveBytes(inputs.nbytes + 10) as counter:
        with pytest.raises(torch.OutOfMemoryError):
            inputs.sort()
        assert counter.live_bytes == counter.peak_bytes == 0


@pytest.mark.parametrize("limit", [0, -5])
def test_limit_below_one_byte_is_refused(limit: int) -> None:
    with pytest.raises(ValueError, match=f"limit_bytes is {limit}, expected at least 1"):
        LiveBytes(limit)


def deep_model(width: int = 64) -> nn.Sequential:
    return nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(6)))


@pytest.mark.parametrize("share", [0.3, 0.97])
def test_after_the_error_nothing_stays_in_use(share: float) -> None:
    """In the forward pass (0.3 of the peak) and in the backward pass (0.97)."""
    model, inputs = deep_model(), torch.randn(512, 64)
    free = LiveBytes()
    free.track(model.parameters())
    with free:
        model(inputs).square().mean().backward()
    model.zero_grad()

    limited = LiveBytes(int(share * free.peak_bytes))
    limited.track(model.parameters())
    before = limited.live_bytes
    gc.collect()
    gc.disable()
    try:
        for _ in range(2):
            with limited, pytest.raises(torch.OutOfMemoryError) as caught:
                model(inputs).square().mean().backward()
            reached = [entry.name for entry in caught.traceback]
            assert ("backward" in reached) == (share > 0.5)
            # The traceback holds the frames, and the frames what they computed.
            del caught
            model.zero_grad()
            assert limited.live_bytes == before
            assert limited.peak_bytes <= limited.limit_bytes
    finally:
        gc.enable()


def test_a_split_step_fits_where_the_plain_step_does_not() -> None:
    model, inputs, targets = deep_model(), torch.randn(512, 64), torch.randn(512, 64)
    optimizer, loss_fn = torch.optim.SGD(model.parameters(), lr=0.1), nn.MSELoss()
    budget = 600 * 2**10
    counter = LiveBytes(budget)
    counter.track(model.parameters())
    with counter, pytest.raises(torch.OutOfMemoryError):
        loss_fn(model(inputs), targets).backward()
    model.zero_grad()

    accumulator = StreamedAccumulator(model, optimizer, loss_fn, micro_batch_size=64)
    with counter:
        counter.reset_peak()
        result = accumulator.step(inputs, targets)
    assert result.micro_batches == 8
    assert 0 < counter.peak_bytes <= budget


def test_an_error_inside_a_split_step_pins_nothing() -> None:
    model, inputs, targets = deep_model(), torch.randn(512, 64), torch.randn(512, 64)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer, loss_fn = torch.optim.SGD(model.parameters(), lr=0.1), nn.MSELoss()
    accumulator = StreamedAccumulator(model, optimizer, loss_fn, micro_batch_size=512)
    counter = LiveBytes()
    counter.track(model.parameters())
    live = counter.live_bytes
    # Room for some layers of one sample, so that no smaller micro-batch helps.
    counter.limit_bytes = live + 2**11
    with counter, pytest.raises(torch.OutOfMemoryError):
        accumulator.step(inputs, targets)
    gc.collect()
    assert counter.live_bytes == live
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def test_nested_counters_count_each_for_itself() -> None:
    with LiveBytes(1000) as outer:
        first = torch.zeros(600, dtype=torch.uint8)
        with LiveBytes(300) as inner:
            second = torch.zeros(200, dtype=torch.uint8)
            assert (outer.live_bytes, inner.live_bytes) == (800, 200)
            with pytest.raises(torch.OutOfMemoryError, match="of the 300 B"):
                torch.zeros(150, dtype=torch.uint8)
        with LiveBytes(5000) as roomy, pytest.raises(torch.OutOfMemoryError, match="of the 1000 B"):
            torch.zeros(250, dtype=torch.uint8)
        assert (outer.live_bytes, inner.live_bytes, roomy.live_bytes) == (800, 200, 0)
        with outer:
            third = torch.zeros(100, dtype=torch.uint8)
        assert outer.live_bytes == 900, "entered twice, it counts once"
    del first, second, third
    assert (outer.live_bytes, inner.live_bytes) == (0, 0)


def test_entering_again_goes_on_counting() -> None:
    counter = LiveBytes()
    with counter:
        first = torch.zeros(10)
    uncounted = torch.zeros(1000)
    with counter:
        second = torch.zeros(10)
    assert counter.live_bytes == first.nbytes + second.nbytes
    assert len(uncounted) == 1000


def test_fake_meta_and_sparse_tensors_hold_no_counted_memory() -> None:
    with LiveBytes() as counter:
        meta = torch.zeros(1000, device="meta") + 1
        with FakeTensorMode():
            fake = torch.zeros(1000) + 1
        dense = torch.eye(3)
        sparse = dense.to_sparse() * 2
        assert counter.live_bytes >= dense.nbytes
        assert counter.live_bytes < 1000
    assert meta.shape == fake.shape
    assert sparse.is_sparse


def test_tensors_do_not_keep_the_counter_alive() -> None:
    counter = LiveBytes()
    with counter:
        tensor = torch.zeros(10)
    reference = weakref.ref(counter)
    gc.disable()
    try:
        del counter
        assert reference() is None
    finally:
        gc.enable()
    del tensor
