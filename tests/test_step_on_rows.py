"""The step on rows by index is the step on the tensors that they stand for."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tolerances
import torch
from reference.full_batch import assert_gradients_match, full_batch, gradients_of
from torch import Tensor, nn

from sbp_fast import StreamedAccumulator, plan, verify
from sbp_fast.data import Rows
from sbp_fast.ops.native import load_prefetch
from sbp_fast.streaming import Prefetcher

LENGTH, SAMPLES = 23, 13
SPLITS = pytest.mark.parametrize("micro_batch_size", [1, 3, 5, SAMPLES, 40])


@pytest.fixture(params=["native", "python"], autouse=True)
def _path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the prefetcher's thread, and as in an installation without it."""
    if request.param == "python":
        monkeypatch.setattr("sbp_fast.accumulator.make_ring", lambda device: None)
    elif not load_prefetch().usable:
        pytest.skip(load_prefetch().reason)


NATIVE = pytest.mark.parametrize("_path", ["native"], indirect=True)


def data_set() -> tuple[Tensor, Tensor, Tensor]:
    """Images, labels, and an index that repeats some rows and leaves out others."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(LENGTH, 3, 6, 5, generator=generator)
    labels = torch.randint(0, 4, (LENGTH,), generator=generator)
    return images, labels, torch.randint(0, LENGTH, (SAMPLES,), generator=generator)


def on_disk(tensor: Tensor, folder: Path) -> np.memmap[Any, Any]:
    path = folder / f"{len(os.listdir(folder))}.npy"
    np.save(path, tensor.numpy())
    mapped = np.load(path, mmap_mode="r")
    assert isinstance(mapped, np.memmap)
    return mapped


def placed(where: str, tensor: Tensor, folder: Path) -> Any:
    """The same values, lying in several ways."""
    if where == "tensor":
        return tensor
    if where == "array":
        return tensor.numpy()
    if where == "memmap":
        return on_disk(tensor, folder)
    if where == "backwards":
        return np.ascontiguousarray(tensor.numpy()[::-1])[::-1]
    if where == "channels_last":
        return tensor.to(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor
    assert where == "strided"
    return torch.stack([tensor, -tensor], dim=-1)[..., 0]


PLACES = pytest.mark.parametrize(
    "where", ["tensor", "array", "memmap", "backwards", "channels_last", "strided"]
)


def net(norm: bool = False, dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4) if norm else nn.Identity(),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(48, 4),
    ).double()


def accumulator_for(model: nn.Module, micro_batch_size: int, **options: Any) -> StreamedAccumulator:
    loss_fn = options.pop("loss_fn", nn.CrossEntropyLoss(weight=torch.arange(1.0, 5).double()))
    return StreamedAccumulator(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        loss_fn,
        micro_batch_size=micro_batch_size,
        **options,
    )


def check_against_oracle(model: nn.Module, oracle: Any) -> None:
    assert_gradients_match(gradients_of(model), oracle.gradients, tolerances.STEP[torch.float64])


class TestStep:
    @PLACES
    @SPLITS
    def test_is_that_of_the_gathered_tensors(
        self, where: str, micro_batch_size: int, tmp_path: Path
    ) -> None:
        images, labels, index = data_set()
        images = images.double()
        model = net()
        oracle = full_batch(
            model, nn.CrossEntropyLoss(weight=torch.arange(1.0, 5)), images[index], labels[index]
        )
        x = Rows(placed(where, images, tmp_path), index)
        y = Rows(placed(where, labels, tmp_path), index)
        accumulator = accumulator_for(model, micro_batch_size)
        for _ in range(2):  # the second time through slots that are there
            accumulator.backward(x, y)
            check_against_oracle(model, oracle)

    @SPLITS
    @pytest.mark.parametrize("mode", ["r", "r+", "c"])
    def test_on_a_mapped_file_itself(
        self, mode: Any, micro_batch_size: int, tmp_path: Path
    ) -> None:
        images, labels, _ = data_set()
        images = images.double()
        model = net()
        oracle = full_batch(model, nn.CrossEntropyLoss(weight=torch.arange(1.0, 5)), images, labels)
        mapped = on_disk(images, tmp_path)
        accumulator_for(model, micro_batch_size).backward(
            np.load(str(mapped.filename), mmap_mode=mode), labels
        )
        check_against_oracle(model, oracle)

    @pytest.mark.parametrize("cross_sample_loss", [False, True])
    @SPLITS
    def test_where_all_micro_batches_meet(
        self, micro_batch_size: int, cross_sample_loss: bool, tmp_path: Path
    ) -> None:
        """They are kept: slots would be overwritten under them."""
        images, labels, index = data_set()
        images = images.double()
        model = net(norm=True)
        loss_fn = nn.CrossEntropyLoss()
        oracle = full_batch(model, loss_fn, images[index], labels[index])
        accumulator = accumulator_for(
            model, micro_batch_size, cross_sample_loss=cross_sample_loss, loss_fn=loss_fn
        )
        accumulator.backward(Rows(on_disk(images, tmp_path), index), Rows(labels, index))
        check_against_oracle(model, oracle)

    @SPLITS
    def test_where_samples_are_compared(self, micro_batch_size: int) -> None:
        images, _, index = data_set()
        images = images.double()
        model = net()

        def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
            return torch.cdist(outputs, outputs + targets[:, None]).square().mean()

        factors = torch.linspace(0, 1, LENGTH).double()
        oracle = full_batch(model, loss_fn, images[index], factors[index])
        accumulator_for(model, micro_batch_size, cross_sample_loss=True, loss_fn=loss_fn).backward(
            Rows(images, index), Rows(factors, index)
        )
        check_against_oracle(model, oracle)

    @SPLITS
    def test_with_dropout_per_sample(self, micro_batch_size: int) -> None:
        images, labels, index = data_set()
        images = images.double()

        def gradients(x: Any, y: Any, size: int) -> dict[str, Tensor | None]:
            model = net(dropout=0.5)
            torch.manual_seed(2)
            accumulator_for(model, size).backward(x, y)
            return gradients_of(model)

        whole = gradients(images[index], labels[index], SAMPLES)
        split_up = gradients(Rows(images, index), Rows(labels, index), micro_batch_size)
        assert_gradients_match(split_up, whole, tolerances.STEP[torch.float64])

    @SPLITS
    @pytest.mark.parametrize("normalization", ["tokens", "callable"])
    def test_a_dict_with_its_labels(
        self, micro_batch_size: int, normalization: str, tmp_path: Path
    ) -> None:
        """Weights are counted in rows that nobody has gathered; other leaves are as they were."""
        images, labels, index = data_set()
        images = images.double()
        labels[::3] = -100

        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.net = net()

            def forward(self, images: Tensor, labels: Tensor, name: str) -> dict[str, Tensor]:
                assert name == "kept"
                return {"loss": nn.functional.cross_entropy(self.net(images), labels)}

        def count(batch: dict[str, Tensor]) -> Tensor:
            return (batch["labels"] != -100).sum()

        model = Model()
        whole = {"images": images[index], "labels": labels[index], "name": "kept"}
        oracle = full_batch(model, None, whole)
        rows = {
            "images": Rows(on_disk(images, tmp_path), index),
            "labels": Rows(labels, index),
            "name": "kept",
        }
        accumulator_for(
            model,
            micro_batch_size,
            loss_fn=None,
            normalization=count if normalization == "callable" else normalization,
        ).backward(rows)
        check_against_oracle(model, oracle)

    def test_a_stream_of_rows(self) -> None:
        images, labels, index = data_set()
        images = images.double()
        model = net()
        loss_fn = nn.CrossEntropyLoss()
        oracle = full_batch(model, loss_fn, images[index], labels[index])

        def items() -> Iterator[tuple[Rows, Rows]]:
            for part in index.split(5):
                yield Rows(images, part), Rows(labels, part)

        accumulator_for(model, 2, loss_fn=loss_fn).backward(items())
        check_against_oracle(model, oracle)

    def test_a_model_that_writes_to_its_inputs(self) -> None:
        images, labels, index = data_set()
        images = images.double()
        model = nn.Sequential(nn.ReLU(inplace=True), net())
        loss_fn = nn.CrossEntropyLoss()
        oracle = full_batch(model, loss_fn, images[index], labels[index])
        before = images.clone()
        accumulator_for(model, 3, loss_fn=loss_fn).backward(Rows(images, index), labels[index])
        check_against_oracle(model, oracle)
        assert torch.equal(images, before)

    def test_a_model_that_keeps_its_inputs(self, tmp_path: Path) -> None:
        """What it has kept is not overwritten by what comes later."""
        images, labels, index = data_set()
        images = images.double()
        kept: list[Tensor] = []
        model = net()
        model.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))
        accumulator = accumulator_for(model, 3, probe=False)
        for _ in range(2):
            accumulator.backward(Rows(on_disk(images, tmp_path), index), labels[index])
        assert torch.equal(torch.cat(kept), torch.cat([images[index]] * 2))


@NATIVE
class TestSlots:
    def test_no_memory_is_allocated_after_the_first_step(self) -> None:
        images, labels, index = data_set()
        images = images.double()
        places: list[tuple[int, int]] = []
        model = net()
        model.register_forward_pre_hook(
            lambda _, inputs: places.append((inputs[0].data_ptr(), len(inputs[0])))
        )
        accumulator = accumulator_for(model, 3, probe=False)
        accumulator.step(Rows(images, index), Rows(labels, index))
        assert [samples for _, samples in places] == [3, 3, 3, 3, 1]
        first = {place for place, samples in places if samples == 3}
        assert len(first) == 2
        places.clear()
        for _ in range(3):
            accumulator.step(Rows(images, index), Rows(labels, index))
        assert {place for place, samples in places if samples == 3} == first

    def test_micro_batches_that_meet_have_memory_of_their_own(self) -> None:
        images, labels, index = data_set()
        accumulator = accumulator_for(net(norm=True), 3, loss_fn=nn.CrossEntropyLoss())
        accumulator.step(Rows(images.double(), index), Rows(labels, index))
        ring = accumulator._ring
        assert isinstance(ring, Prefetcher)
        assert not any(slot._arrivals for slot in ring._slots)


@pytest.mark.parametrize("budget", [30_000, 45_000, 200_000])
@pytest.mark.parametrize("where", ["rows", "memmap"])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_a_budget_allows_as_much_as_for_tensors(
    budget: int, where: str, batch_norm: bool, tmp_path: Path
) -> None:
    """The large batch is host memory, and its rows are, wherever they lie."""
    images = torch.randn(64, 3, 32, 32)
    labels = torch.randint(0, 4, (64,))

    def sizes_and_peaks(x: Any) -> list[tuple[int, int]]:
        torch.manual_seed(1)
        model = nn.Sequential(
            nn.Conv2d(3, 4, 3, stride=8),
            nn.BatchNorm2d(4) if batch_norm else nn.Identity(),
            nn.Flatten(),
            nn.Linear(64, 4),
        )
        accumulator = StreamedAccumulator(
            model,
            torch.optim.SGD(model.parameters(), lr=0.1),
            nn.CrossEntropyLoss(),
            memory_budget=budget,
        )
        results = [accumulator.step(x, labels) for _ in range(2)]
        return [(result.micro_batch_size, result.peak_bytes) for result in results]

    rows = Rows(images, torch.arange(64)) if where == "rows" else on_disk(images, tmp_path)
    assert sizes_and_peaks(rows) == sizes_and_peaks(images)


@NATIVE
def test_an_index_changed_under_the_step_is_an_error() -> None:
    """And the step changes nothing."""
    images, labels, index = data_set()
    model = net().float()
    rows = Rows(images, index)
    rows.index[8] = LENGTH
    before = [parameter.clone() for parameter in model.parameters()]
    accumulator = accumulator_for(model, 3, loss_fn=nn.CrossEntropyLoss(), probe=False)
    with pytest.raises(
        IndexError, match=r"index\[2\] of a micro-batch is 23; the source has 23 rows"
    ):
        accumulator.step(rows, labels[index])
    assert all(map(torch.equal, model.parameters(), before))
    accumulator.step(Rows(images, index), labels[index])


def test_plans_and_certificates_take_rows() -> None:
    images, labels, index = data_set()
    model = net().float()
    loss_fn = nn.CrossEntropyLoss()
    x, y = Rows(images, index), Rows(labels, index)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    arguments = {"batch_size": 8, "budget": "1GiB", "device": "cpu", "optimizer": optimizer}
    assert str(plan(model, loss_fn, (x, y), **arguments)) == str(
        plan(model, loss_fn, (images[index], labels[index]), **arguments)
    )
    assert verify(model, loss_fn, x, y, micro_batch_sizes=[3]).holds
