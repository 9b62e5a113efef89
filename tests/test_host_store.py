"""What waits in host memory: whose it is, how much it is, and that it comes back as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from sbp_fast.memory import LiveBytes
from sbp_fast.memory.host_store import HostBudgetError, HostStore

CPU = torch.device("cpu")
KIB = 1 << 10


def make_store(**options: object) -> HostStore:
    return HostStore(CPU, **options)  # type: ignore[arg-type]


def floats(kib: int) -> Tensor:
    return torch.randn(kib * KIB // 4)


class TestAccounts:
    def test_counts_a_storage_once(self) -> None:
        store = make_store()
        tensor = floats(8)
        held = [store.hold(tensor), store.hold(tensor.view(2, -1)), store.hold(tensor[:5])]
        assert store.host_bytes == 0
        store.send_away()
        assert store.host_bytes == 8 * KIB
        for one in held:
            one.take()
        assert store.host_bytes == 0
        assert store.peak_host_bytes == 8 * KIB

    def test_what_nobody_holds_waits_no_longer(self) -> None:
        store = make_store()
        held = store.hold(floats(8))
        kept = store.hold(floats(4))
        store.send_away()
        del held
        assert store.host_bytes == 4 * KIB
        assert store.peak_host_bytes == 12 * KIB
        del kept
        assert store.host_bytes == 0

    def test_what_is_taken_goes_away_again(self) -> None:
        store = make_store()
        held = store.hold(floats(8))
        for _ in range(3):
            store.send_away()
            assert store.host_bytes == 8 * KIB
            held.take()
            assert store.host_bytes == 0

    def test_leaves_alone_what_is_not_its_own(self) -> None:
        store = make_store()
        weight = torch.nn.Parameter(floats(8))
        store.leave_alone([weight])
        held = store.hold(weight.t())
        store.send_away()
        assert store.host_bytes == 0
        assert held.take().data_ptr() == weight.data_ptr()

    def test_device_and_host_are_never_mixed(self) -> None:
        with LiveBytes() as counter:
            store = make_store(counter=counter)
            tensor = floats(8)
            held = store.hold(tensor)
            assert counter.live_bytes == 8 * KIB
            store.send_away()
            assert (counter.live_bytes, store.host_bytes) == (0, 8 * KIB)
            held.take()
            assert (counter.live_bytes, store.host_bytes) == (8 * KIB, 0)
            store.send_away()
            del tensor, held
            assert (counter.live_bytes, store.host_bytes) == (0, 0)
            assert counter.peak_bytes == 8 * KIB

    def test_a_limited_device_has_room_for_what_waits_elsewhere(self) -> None:
        with LiveBytes(limit_bytes=20 * KIB) as counter:
            store = make_store(counter=counter)
            held = []
            for _ in range(10):
                held.append(store.hold(floats(8)))
                store.send_away()
            assert store.host_bytes == 80 * KIB
            for one in held:
                one.take()
                store.send_away()
            held[0].take()
            held[1].take()
            with pytest.raises(torch.OutOfMemoryError, match="take_back"):
                held[2].take()


class TestSharedWithOthers:
    def test_names_what_others_would_miss(self) -> None:
        store = make_store()
        variable, alone = floats(8), floats(4)
        held = [store.hold(variable), store.hold(alone)]
        del alone
        shared = store.send_away()
        assert [slot.nbytes for slot in shared] == [8 * KIB]
        store.bring_back(shared)
        assert store.host_bytes == 4 * KIB
        assert len(held) == 2

    def test_a_view_of_somebody_else_counts_as_well(self) -> None:
        store = make_store()
        tensor = floats(8)
        view = tensor[3:5]
        held = store.hold(tensor)
        del tensor
        assert len(store.send_away()) == 1
        assert view.shape == (2,)
        del held


class TestFiles:
    @pytest.fixture
    def tensors(self) -> list[Tensor]:
        return [torch.randn(100, 256), torch.randn(64, 3, 10, 10).to(torch.float16), floats(400)]

    def test_contents_come_back_from_files(self, tmp_path: Path, tensors: list[Tensor]) -> None:
        store = make_store(budget=1, spill_directory=tmp_path)
        copies = [tensor.clone() for tensor in tensors]
        views = [tensor.transpose(0, -1)[1:] for tensor in tensors]
        held = [store.hold(tensor) for tensor in tensors]
        shared = store.send_away()
        assert store.file_bytes == sum(tensor.nbytes for tensor in tensors)
        assert store.host_bytes == 0
        assert all(tensor.untyped_storage().nbytes() == 0 for tensor in tensors)
        store.bring_back(shared)
        assert store.file_bytes == 0
        for tensor, copy, view, one in zip(tensors, copies, views, held, strict=True):
            assert torch.equal(tensor, copy)
            assert torch.equal(view, copy.transpose(0, -1)[1:])
            assert torch.equal(one.take(), copy)
        assert store.peak_file_bytes == sum(tensor.nbytes for tensor in tensors)

    def test_files_leave_no_trace(self, tmp_path: Path, tensors: list[Tensor]) -> None:
        store = make_store(budget=1, spill_directory=tmp_path)
        held = [store.hold(tensor) for tensor in tensors]
        store.send_away()
        assert store.file_bytes > 0
        assert list(tmp_path.iterdir()) == []
        del held
        assert store.file_bytes == 0

    def test_only_what_is_beyond_the_budget(self, tmp_path: Path) -> None:
        store = make_store(budget=300 * KIB, spill_directory=tmp_path)
        held = [store.hold(floats(100)) for _ in range(5)]
        store.send_away()
        assert store.host_bytes == 300 * KIB
        assert store.file_bytes == 200 * KIB
        assert len(held) == 5

    def test_autograd_does_not_notice(self, tmp_path: Path) -> None:
        store = make_store(budget=1, spill_directory=tmp_path)
        weight = torch.randn(200, 200, requires_grad=True)
        store.leave_alone([weight])
        inputs = torch.randn(300, 200)

        def loss() -> Tensor:
            return torch.sigmoid(torch.tanh(inputs @ weight) @ weight).square().sum()

        (expected,) = torch.autograd.grad(loss(), weight)
        with torch.autograd.graph.saved_tensors_hooks(store.hold, lambda held: held.take()):
            result = loss()
        store.send_away()
        assert store.file_bytes > 0
        (found,) = torch.autograd.grad(result, weight)
        assert torch.equal(found, expected)

    def test_beyond_the_budget_without_files(self) -> None:
        store = make_store(budget=10 * KIB)
        held = [store.hold(floats(8)), store.hold(floats(8))]
        with pytest.raises(HostBudgetError, match=r"16\.0 KiB .* host_budget is 10\.0 KiB.*spill"):
            store.send_away()
        assert len(held) == 2


class TestInPlace:
    def test_a_changed_tensor_is_refused(self) -> None:
        store = make_store()
        tensor = floats(8)
        held = store.hold(tensor)
        tensor.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            held.take()

    def test_a_change_before_counts_as_it_is(self) -> None:
        store = make_store()
        tensor = floats(8)
        tensor.add_(1)
        assert torch.equal(store.hold(tensor).take(), tensor)


class TestRoomOnTheDevice:
    def test_only_what_does_not_fit_goes_away(self) -> None:
        with LiveBytes() as counter:
            store = make_store(counter=counter, device_room=20 * KIB)
            held = [store.hold(floats(8)) for _ in range(4)]
            assert store.send_away() == []
            assert (counter.live_bytes, store.host_bytes) == (16 * KIB, 16 * KIB)
            for one in held:
                one.take()
            store.send_away()
            assert store.host_bytes == 16 * KIB

    def test_room_that_is_free_again_is_used_again(self) -> None:
        store = make_store(device_room=10 * KIB)
        first = store.hold(floats(8))
        store.send_away()
        del first
        second = store.hold(floats(8))
        store.send_away()
        assert store.host_bytes == 0
        del second


class TestGuard:
    def test_an_operation_finds_what_somebody_else_sent_away(self, tmp_path: Path) -> None:
        store = make_store(budget=1, spill_directory=tmp_path)
        kept_by_a_module = floats(100)
        copy = kept_by_a_module.clone()
        held = store.hold(kept_by_a_module)
        store.send_away()
        with store.guarding():
            assert torch.equal(torch.cat([kept_by_a_module, copy]), torch.cat([copy, copy]))
        assert store.file_bytes == 0
        del held

    def test_what_outlives_the_store_has_its_contents(self, tmp_path: Path) -> None:
        store = make_store(budget=1, spill_directory=tmp_path)
        kept_by_a_module = floats(100)
        copy = kept_by_a_module.clone()
        held = store.hold(kept_by_a_module)
        store.send_away()
        assert kept_by_a_module.untyped_storage().nbytes() == 0
        del held
        assert torch.equal(kept_by_a_module, copy)
