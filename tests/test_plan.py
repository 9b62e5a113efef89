"""A plan: what it chooses, what it says, and that it leaves everything alone."""

from __future__ import annotations

import copy
import random
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import sbp_fast
from sbp_fast import Plan, StreamedAccumulator, plan
from sbp_fast.memory import LiveBytes, format_bytes, memory_budget
from sbp_fast.planning import BudgetError

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
WIDTH, CLASSES, BATCH = 32, 4, 120


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(WIDTH, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, CLASSES)
    )


def sample(samples: int = 3) -> tuple[Tensor, Tensor]:
    return torch.randn(samples, WIDTH), torch.randint(CLASSES, (samples,))


def planned(model: nn.Module | None = None, **options: Any) -> Plan:
    given: dict[str, Any] = {"batch_size": BATCH, "budget": "100KiB", "device": "cpu", **options}
    return plan(net() if model is None else model, nn.CrossEntropyLoss(), sample(), **given)


@pytest.fixture(scope="module")
def chosen() -> Plan:
    return planned()


def test_the_chosen_size_runs_within_the_budget_and_the_next_does_not() -> None:
    model = net()
    chosen = planned(model)
    assert 1 < chosen.micro_batch_size < BATCH
    next_larger = min(
        -(-BATCH // count)
        for count in range(1, BATCH)
        if -(-BATCH // count) > chosen.micro_batch_size
    )
    inputs, targets = sample(BATCH)
    for size, fits in ((chosen.micro_batch_size, True), (next_larger, False)):
        trained = copy.deepcopy(model)
        accumulator = StreamedAccumulator(
            trained,
            torch.optim.AdamW(trained.parameters()),
            nn.CrossEntropyLoss(),
            micro_batch_size=size,
            probe=False,
        )
        memory = memory_budget("cpu", None)
        memory.track([*trained.parameters(), *trained.buffers()])
        with memory:
            accumulator.step(inputs, targets)
            memory.reset_peak()
            accumulator.step(inputs, targets)
        assert (memory.peak_bytes <= chosen.budget) == fits


def test_rows_are_the_choice_and_powers_of_two(chosen: Plan) -> None:
    assert [row.micro_batch_size for row in chosen.rows] == sorted(
        {1, 2, 4, 8, 16, 32, 64, BATCH, chosen.micro_batch_size}
    )
    assert {row.policy for row in chosen.rows} == {chosen.policy} == {"keep"}
    for row in chosen.rows:
        assert row.micro_batches == -(-BATCH // row.micro_batch_size)
        assert row.fits == (row.peak.device_bytes <= chosen.budget)
        assert min(vars(row.peak).values()) >= 0
    assert chosen.chosen.fits
    assert chosen.chosen.peak.host_bytes > 0, "batch norm makes activations wait"


def test_too_little_names_what_would_do() -> None:
    with pytest.raises(
        BudgetError, match="no micro-batch of a batch of 120 fits into 20"
    ) as caught:
        planned(budget="20KiB")
    error = caught.value
    assert isinstance(error, ValueError)
    assert f"that would do is {error.smallest_budget} bytes" in str(error)
    enough = planned(budget=error.smallest_budget)
    assert enough.chosen.peak.device_bytes == error.smallest_budget
    with pytest.raises(BudgetError):
        planned(budget=error.smallest_budget - 1)


def test_words(chosen: Plan) -> None:
    lines = str(chosen).splitlines()
    assert lines[0] == (
        f"Batch 120 within 100.0 KiB on cpu: micro_batch_size={chosen.micro_batch_size} "
        f"({chosen.chosen.micro_batches} micro-batches), activations='keep', "
        f"peak {format_bytes(chosen.chosen.peak.device_bytes)}"
    )
    assert len(lines) == 4 + len(chosen.rows)
    marked = [line for line in lines if line.endswith("<-")]
    assert [line.split()[1] for line in marked] == [str(chosen.micro_batch_size)]
    assert sum("over budget" in line for line in lines) == sum(not row.fits for row in chosen.rows)
    assert "waits on the host" in lines[2]


def test_figure(chosen: Plan, tmp_path: Path) -> None:
    chosen.save_plot(tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(PNG_SIGNATURE)
    chosen.save_plot(tmp_path / "plan.svg")
    drawn = (tmp_path / "plan.svg").read_text()
    for label in ("budget", "chosen", "optimizer", "transient", "peak memory of a step (KiB)"):
        assert f"<!-- {label} -->" in drawn


class Drawing(nn.Module):
    """From every generator there is, as it computes."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (1.0 + random.random() + np.random.rand()) + torch.randn(x.shape)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_nothing_changes_and_no_memory_is_taken(device: str) -> None:
    model = net().append(Drawing())
    optimizer = torch.optim.AdamW(model.parameters())
    inputs, targets = sample()
    nn.CrossEntropyLoss()(model(inputs), targets).backward()
    optimizer.step()
    tensors = {**model.state_dict(), **{f"{i}": p for i, p in enumerate(model.parameters())}}
    before = {name: (tensor, tensor._version, tensor.clone()) for name, tensor in tensors.items()}
    gradients = [parameter.grad for parameter in model.parameters()]
    state = copy.deepcopy(optimizer.state_dict())
    drawn = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # type: ignore[index]
    with LiveBytes() as counter, torch.no_grad():
        plan(
            model,
            nn.CrossEntropyLoss(),
            (inputs, targets),
            batch_size=BATCH,
            budget="10MiB",
            device=device,
            optimizer=optimizer,
        )
        assert counter.peak_bytes < 1024, "a few numbers that steps keep"
    assert torch.equal(torch.get_rng_state(), drawn[0])
    assert random.getstate() == drawn[1]
    assert np.array_equal(np.random.get_state()[1], drawn[2])  # type: ignore[index]
    for name, tensor in {
        **model.state_dict(),
        **{f"{i}": p for i, p in enumerate(model.parameters())},
    }.items():
        assert type(tensor) in (Tensor, nn.Parameter)
        assert tensor.data_ptr() == before[name][0].data_ptr()
        assert tensor._version == before[name][1]
        assert torch.equal(tensor, before[name][2])
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert parameter.grad is gradient
        assert not parameter._post_accumulate_grad_hooks
    assert all(
        torch.equal(torch.as_tensor(value), torch.as_tensor(state["state"][index][name]))
        for index, values in optimizer.state_dict()["state"].items()
        for name, value in values.items()
    )
    assert model.training


def test_a_model_without_memory_has_the_same_plan(chosen: Plan) -> None:
    with torch.device("meta"):
        model = net()
        on_meta = planned(model)
    assert on_meta == chosen


def test_a_large_model_on_a_device_that_is_not_there() -> None:
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(8192, 8192, bias=False) for _ in range(16)))
    weights = 16 * 8192 * 8192 * 4
    sample = torch.empty(1, 8192, device="meta")
    chosen = plan(
        model,
        nn.MSELoss(),
        (sample, sample),
        batch_size=4096,
        budget="20GiB",
        device="cuda",
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    )
    peak = chosen.chosen.peak
    assert (peak.parameters, peak.optimizer) == (weights, weights)
    assert peak.device_bytes >= 3 * weights
    assert chosen.micro_batch_size == 4096


class OwnLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, CLASSES)

    def forward(self, pixels: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": nn.functional.cross_entropy(self.layer(pixels), labels)}


def test_a_model_that_returns_its_own_loss() -> None:
    pixels, labels = sample()
    chosen = plan(
        OwnLoss(),
        None,
        {"pixels": pixels, "labels": labels},
        batch_size=BATCH,
        budget="1MiB",
        device="cpu",
    )
    assert chosen.micro_batch_size == BATCH


class ByValue(nn.Module):
    """Whose shapes depend on values."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, CLASSES)
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "item":
            return self.layer(x)[:, : 3 + int(x.long().sum().item())]
        return self.layer(x[x[:, 0] > 0])


@pytest.mark.parametrize("way", ["item", "mask"])
def test_shapes_that_depend_on_values_are_refused(way: str) -> None:
    with pytest.raises(ValueError, match="whose result depends on values"):
        planned(ByValue(way))


def test_a_loss_that_holds_the_model_itself_is_refused() -> None:
    model = net()

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        penalty = model[0].weight.square().sum()  # type: ignore[union-attr, operator]
        return nn.functional.cross_entropy(outputs, targets) + penalty

    with pytest.raises(ValueError, match="gradients reached the model itself and not its copy"):
        plan(model, loss_fn, sample(), batch_size=8, budget="1MiB", device="cpu")
    assert all(parameter.grad is None for parameter in model.parameters())


def test_warnings_are_those_of_the_step_and_come_there() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        planned(batch_norm="micro_batch")


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"budget": "much"}, ValueError, "memory budget 'much' is no size"),
        ({"budget": 0}, ValueError, "memory budget 0 is 0 bytes"),
        ({"batch_size": 0}, ValueError, "batch_size is 0; it must be at least 1"),
        ({"batch_size": 2.0}, TypeError, "batch_size is 2.0; it must be an int"),
        ({"device": "meta"}, ValueError, "device is 'meta'; it must be one of 'cpu', 'cuda'"),
        ({"activations": "some"}, ValueError, "activations is 'some'; it must be one of 'auto'"),
        ({"batch_norm": "best"}, ValueError, "batch_norm is 'best'; it must be one of"),
        ({"optimizer": 3}, TypeError, "optimizer is a int; it must be a torch.optim.Optimizer"),
    ],
)
def test_bad_arguments_are_named(
    options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=re.escape(message)):
        planned(**options)


def test_a_sample_without_targets_is_named() -> None:
    with pytest.raises(
        ValueError, match=re.escape("sample is a Tensor; it must be a pair (inputs")
    ):
        plan(net(), nn.MSELoss(), torch.zeros(2, WIDTH), batch_size=2, budget=10**6, device="cpu")
    with pytest.raises(ValueError, match="first dimensions of inputs and targets must be equal"):
        plan(
            net(),
            nn.MSELoss(),
            (torch.zeros(2, WIDTH), torch.zeros(3)),
            batch_size=2,
            budget=10**6,
            device="cpu",
        )


def test_plan_is_a_function_of_the_package() -> None:
    assert callable(sbp_fast.plan)
