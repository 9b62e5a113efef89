"""Fake tensors are counted as real ones are, and copies without memory are like their originals."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor

from sbp_fast.memory import LiveBytes
from sbp_fast.memory.fake_bytes import FakeLiveBytes
from sbp_fast.planning.fake_copies import fake_batch, fake_copies


def views_and_in_place() -> list[Tensor]:
    tensor = torch.zeros(8, 100)
    views = [tensor[1], tensor.t(), tensor.view(-1), *tensor.split(2)]
    tensor.add_(1).mul_(2)
    return views


def lists() -> list[Tensor]:
    return list(torch._foreach_mul([torch.zeros(10), torch.zeros(20)], 2.0))


def resized() -> Tensor:
    result = torch.empty(0)
    torch.add(torch.zeros(100), 1, out=result)
    return result


def saved_for_backward() -> Tensor:
    weight = torch.zeros(256, 3, requires_grad=True)
    weight.exp().square().softmax(1).sum().backward()
    assert weight.grad is not None
    return weight.grad


def convolution() -> Tensor:
    layer = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
    layer(torch.zeros(4, 3, 10, 10)).mean().backward()
    return layer[0].weight.grad  # type: ignore[union-attr, return-value]


@pytest.mark.parametrize(
    "compute", [views_and_in_place, lists, resized, saved_for_backward, convolution]
)
def test_counted_as_real_tensors(compute: Callable[[], Any]) -> None:
    with LiveBytes() as real:
        kept = compute()
        live = real.live_bytes
    with FakeTensorMode(), FakeLiveBytes() as fake:
        fake_kept = compute()
        assert fake.live_bytes == live > 0
        assert fake.peak_bytes == real.peak_bytes
        del fake_kept
        assert fake.live_bytes == 0
    del kept


def test_sizes_are_rounded_up_to_the_granule() -> None:
    with FakeTensorMode(), FakeLiveBytes(granule=512) as counter:
        kept = [torch.zeros(1), torch.zeros(128), torch.zeros(129)]
        assert counter.live_bytes == 512 + 512 + 1024
    assert len(kept) == 3


def test_phases_have_peaks_of_their_own() -> None:
    with FakeTensorMode(), FakeLiveBytes() as counter:
        counter.phase = "one"
        kept = torch.zeros(10)
        torch.zeros(100)
        counter.phase = "two"
        torch.zeros(50)
        assert counter.peaks == {"one": 440, "two": 240}
        counter.reset_peak()
        assert counter.peaks == {}
        assert counter.live_bytes == kept.nbytes


def test_answers_keep_a_step_on_its_way() -> None:
    with FakeTensorMode(), FakeLiveBytes() as counter:
        numbers = torch.zeros(3)
        assert float(numbers.sum()) == 1.0
        assert not numbers.any()
        counter.yes = True
        assert numbers.any()
        assert torch.equal(numbers, numbers + 1)
        assert int(torch.randint(2**62, ())) == 0
        assert torch.randint(5, (4,)).shape == (4,)
        assert float(torch.tensor(0.25)) == 0.25, "a value that is known"
        with pytest.raises(DataDependentOutputException):
            int(numbers.long().max())


class Odd(nn.Module):
    """Tied weights, a view of a buffer, a tensor that is no buffer, a strided weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.strided = nn.Parameter(torch.randn(6, 4).t(), requires_grad=False)
        self.register_buffer("table", torch.arange(20.0))
        self.register_buffer("part", self.table[5:9])
        self.loose = torch.ones(3, dtype=torch.float64)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_copies_are_like_their_originals(device: str) -> None:
    with torch.device(device):
        model = Odd()
    loss_fn = partial(nn.functional.cross_entropy, weight=torch.rand(11))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    before = copy.deepcopy(model.state_dict())
    with FakeTensorMode(), LiveBytes() as real, FakeLiveBytes():
        fake, fake_loss_fn, fake_optimizer = fake_copies(model, loss_fn, optimizer)
    assert real.peak_bytes == 0, "no memory"
    assert fake.head.weight is fake.embedding.weight
    assert fake.table.untyped_storage()._cdata == fake.part.untyped_storage()._cdata
    assert fake.part.storage_offset() == 5
    assert isinstance(fake.loose, FakeTensor)
    assert isinstance(fake_loss_fn.keywords["weight"], FakeTensor)  # type: ignore[union-attr]
    ours = [*fake.parameters(), *fake.buffers()]
    for mine, original in zip(ours, [*model.parameters(), *model.buffers()], strict=True):
        assert isinstance(mine, FakeTensor)
        assert mine.device.type == "cpu"
        assert (mine.shape, mine.stride(), mine.dtype) == (
            *(original.shape, original.stride(), original.dtype),
        )
        assert mine.requires_grad == original.requires_grad
    assert [id(p) for p in fake_optimizer.param_groups[0]["params"]] == [
        id(p) for p in fake.parameters()
    ]
    assert not any(isinstance(tensor, FakeTensor) for tensor in model.state_dict().values())
    if device == "cpu":
        assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_the_optimizers_state_comes_along() -> None:
    model = nn.Linear(5, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    model(torch.randn(2, 5)).sum().backward()
    optimizer.step()
    with FakeTensorMode():
        fake, _, fake_optimizer = fake_copies(model, None, optimizer)
    state = fake_optimizer.state[next(iter(fake.parameters()))]
    assert isinstance(state["exp_avg"], FakeTensor)
    assert state["exp_avg"].shape == (3, 5)
    assert fake_optimizer.param_groups[0]["lr"] == 0.5


def test_what_cannot_be_copied_is_named() -> None:
    model = nn.Linear(2, 2)
    model.file = open(__file__)  # type: ignore[assignment]  # noqa: SIM115
    lazy = nn.LazyLinear(3)
    with model.file, FakeTensorMode():  # type: ignore[union-attr]
        with pytest.raises(ValueError, match="cannot be copied"):
            fake_copies(model, None, torch.optim.SGD)
        with pytest.raises(ValueError, match="parameter 'weight' has no shape yet"):
            fake_copies(lazy, None, torch.optim.SGD)
        with pytest.raises(TypeError, match="optimizer returned a list"):
            fake_copies(nn.Linear(2, 2), None, list)  # type: ignore[arg-type]


def test_batches_have_samples_as_the_sample_has() -> None:
    sample = {
        "image": torch.zeros(2, 3, 5, 5).to(memory_format=torch.channels_last),
        "label": np.zeros(2, dtype=np.int32),
        "temperature": torch.tensor(0.5),
        "name": "train",
    }
    with FakeTensorMode(allow_non_fake_inputs=True):
        batch = fake_batch(sample, 7)
    assert all(isinstance(batch[name], FakeTensor) for name in ("image", "label", "temperature"))
    assert batch["image"].shape == (7, 3, 5, 5)
    assert batch["image"].is_contiguous(memory_format=torch.channels_last)
    assert (batch["label"].shape, batch["label"].dtype) == ((7,), torch.int32)
    assert batch["temperature"].shape == ()
    assert batch["name"] == "train"
