"""HypergradientLR against the derivative of the loss with respect to the learning rate, by autograd."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sbp_fast import StreamedAccumulator
from sbp_fast.tuning import HypergradientLR

LR, HYPER_LR = 0.05, 1e-3
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "momentum": lambda p, **o: torch.optim.SGD(p, momentum=0.9, **o),
    "dampened": lambda p, **o: torch.optim.SGD(p, momentum=0.9, dampening=0.3, **o),
    "nesterov": lambda p, **o: torch.optim.SGD(p, momentum=0.9, nesterov=True, **o),
    "sgd_decay": lambda p, **o: torch.optim.SGD(p, weight_decay=0.1, **o),
    "nesterov_decay": lambda p, **o: torch.optim.SGD(
        p, momentum=0.9, nesterov=True, weight_decay=0.1, **o
    ),
    "adam": torch.optim.Adam,
    "adam_decay": lambda p, **o: torch.optim.Adam(p, weight_decay=0.1, **o),
    "amsgrad": lambda p, **o: torch.optim.Adam(p, amsgrad=True, betas=(0.5, 0.6), **o),
    "adamw": lambda p, **o: torch.optim.AdamW(p, weight_decay=0.1, **o),
}
EVERY = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()


def batches(number: int) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(8, 5, dtype=torch.float64), torch.randint(3, (8,))) for _ in range(number)]


def penalty(optimizer: torch.optim.Optimizer) -> float:
    """What the optimizer adds to the loss, times half the square of the parameters."""
    group = optimizer.param_groups[0]
    return 0.0 if group.get("decoupled_weight_decay") else group["weight_decay"]


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor], penalty: float) -> Tensor:
    loss = nn.functional.cross_entropy(model(batch[0]), batch[1])
    return loss + penalty / 2 * sum(p.square().sum() for p in model.parameters())


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor]) -> None:
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
    optimizer.step()


def loss_after(
    model: nn.Module,
    make: Callable[..., torch.optim.Optimizer],
    data: list[tuple[Tensor, Tensor]],
    rate: float,
) -> float:
    """Of the last batch, where the step before it was made with ``rate`` and all others with LR."""
    model = copy.deepcopy(model)
    optimizer = make(model.parameters(), lr=LR)
    for batch in data[:-2]:
        train(model, optimizer, batch)
    optimizer.param_groups[0]["lr"] = rate
    train(model, optimizer, data[-2])
    return float(loss_of(model, data[-1], penalty(optimizer)).detach())


class TestDerivative:
    @EVERY
    @pytest.mark.parametrize("steps", [2, 3, 5])
    def test_against_differences(
        self, make: Callable[..., torch.optim.Optimizer], steps: int
    ) -> None:
        model, data, width = mlp(), batches(steps), 3e-6
        derivative = (
            loss_after(model, make, data, LR + width) - loss_after(model, make, data, LR - width)
        ) / (2 * width)
        optimizer = make(model.parameters(), lr=LR)
        scheduler = HypergradientLR(optimizer, 0.0)
        for batch in data[:-1]:
            train(model, optimizer, batch)
        # Alone the last step may change the rate.
        scheduler.load_state_dict({**scheduler.state_dict(), "hyper_lr": HYPER_LR})
        assert scheduler.get_last_lr() == [LR]
        train(model, optimizer, data[-1])
        (lr,) = scheduler.get_last_lr()
        assert lr - LR == pytest.approx(-HYPER_LR * derivative, rel=1e-4)

    @pytest.mark.parametrize("foreach", [False, True])
    @EVERY
    def test_either_implementation(
        self, make: Callable[..., torch.optim.Optimizer], foreach: bool
    ) -> None:
        """Some of torch's write to the gradients that they are given."""
        rates = []
        model, data = mlp(), batches(6)
        for options in ({"foreach": foreach}, {}):
            twin = copy.deepcopy(model)
            optimizer = make(twin.parameters(), lr=LR, **options)
            scheduler = HypergradientLR(optimizer, HYPER_LR)
            for batch in data:
                train(twin, optimizer, batch)
            rates += scheduler.get_last_lr()
        assert rates[0] == pytest.approx(rates[1], rel=1e-12)
        assert rates[0] != LR


def sbp(model: nn.Module, optimizer: torch.optim.Optimizer, **options: Any) -> StreamedAccumulator:
    return StreamedAccumulator(
        model, optimizer, nn.CrossEntropyLoss(), micro_batch_size=3, **options
    )


class TestWithTheAccumulator:
    @EVERY
    def test_the_same_rates_as_for_the_whole_batch(
        self, make: Callable[..., torch.optim.Optimizer]
    ) -> None:
        data, whole = batches(6), mlp()
        split = copy.deepcopy(whole)
        rates = []
        for model in (whole, split):
            optimizer = make(model.parameters(), lr=LR)
            scheduler = HypergradientLR(optimizer, HYPER_LR)
            accumulator = sbp(model, optimizer)
            for batch in data:
                if model is whole:
                    train(model, optimizer, batch)
                else:
                    accumulator.step(*batch)
            rates += scheduler.get_last_lr()
        assert rates[0] != LR
        assert rates[1] == pytest.approx(rates[0], rel=1e-12)

    def test_the_gradient_itself_is_kept(self) -> None:
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        scheduler = HypergradientLR(optimizer, HYPER_LR)
        seen: list[int] = []
        optimizer.register_step_pre_hook(
            lambda *_: seen.extend(p.grad.data_ptr() for p in model.parameters())
        )
        sbp(model, optimizer).step(*batches(1)[0])
        kept = [direction.data_ptr() for direction in scheduler.state_dict()["directions"]]
        assert kept == seen

    def test_a_skipped_step_is_none(self) -> None:
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        scheduler = HypergradientLR(optimizer, HYPER_LR)
        accumulator = sbp(model, optimizer)
        (good, labels), *_ = batches(1)
        accumulator.step(good, labels)
        before = scheduler.state_dict()
        assert accumulator.step(good * math.nan, labels).skipped
        after = scheduler.state_dict()
        assert scheduler.get_last_lr() == [LR]
        assert all(map(torch.equal, before["directions"], after["directions"]))

    def test_of_the_clipped_gradient(self) -> None:
        data, model = batches(2), mlp()
        changes = []
        for bound in (None, 1e-3):
            twin = copy.deepcopy(model)
            optimizer = torch.optim.SGD(twin.parameters(), lr=0.0)
            scheduler = HypergradientLR(optimizer, 1.0)
            accumulator = sbp(twin, optimizer, max_grad_norm=bound)
            norms = [float(accumulator.step(*batch).grad_norm) for batch in data]
            changes += scheduler.get_last_lr()
        # Both gradients were made as long as the bound.
        assert changes[1] == pytest.approx(changes[0] * 1e-6 / (norms[0] * norms[1]), rel=1e-2)


class TestRates:
    def test_finds_the_rate_of_a_quadratic(self) -> None:
        """From a rate that is a thousand times too small."""
        x = nn.Parameter(torch.full((10,), 3.0, dtype=torch.float64))
        optimizer = torch.optim.SGD([x], lr=1e-3)
        scheduler = HypergradientLR(optimizer, 3e-4)
        for _ in range(200):
            optimizer.zero_grad()
            (x.square().sum() / 2).backward()
            optimizer.step()
        assert 0.1 < scheduler.get_last_lr()[0] < 2.0
        assert float(x.detach().norm()) < 1e-3

    def test_never_below_zero(self) -> None:
        x = nn.Parameter(torch.ones(1, dtype=torch.float64))
        optimizer = torch.optim.SGD([x], lr=1.9)
        scheduler = HypergradientLR(optimizer, 100.0)
        for _ in range(2):
            optimizer.zero_grad()
            (x.square().sum() / 2).backward()
            optimizer.step()
        assert scheduler.get_last_lr() == [0.0]

    def test_each_group_has_its_own(self) -> None:
        model, data = mlp(), batches(2)
        groups = [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[2].parameters()}]
        optimizer = torch.optim.SGD(groups, lr=0.2)
        scheduler = HypergradientLR(optimizer, HYPER_LR)
        gradients = []
        for batch in data:
            train(model, optimizer, batch)
            gradients.append([p.grad.clone() for p in model.parameters()])
        products = [float((a * b).sum()) for a, b in zip(*gradients, strict=True)]
        expected = [
            0.1 + HYPER_LR * sum(products[:2]),
            0.2 + HYPER_LR * sum(products[2:]),
        ]
        assert scheduler.get_last_lr() == pytest.approx(expected, rel=1e-12)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
    def test_sums_in_more_than_16_bits(self, dtype: torch.dtype) -> None:
        x = nn.Parameter(torch.zeros(10_000, dtype=dtype))
        optimizer = torch.optim.SGD([x], lr=0.0)
        scheduler = HypergradientLR(optimizer, 1.0)
        for _ in range(2):
            x.grad = torch.full_like(x, 0.125)
            optimizer.step()
        assert scheduler.get_last_lr() == pytest.approx([10_000 / 64], rel=1e-6)

    def test_a_rate_that_is_a_tensor(self) -> None:
        rates, model, data = [], mlp(), batches(4)
        for lr in (LR, torch.tensor(LR, dtype=torch.float64)):
            twin = copy.deepcopy(model)
            optimizer = torch.optim.SGD(twin.parameters(), lr=lr)
            scheduler = HypergradientLR(optimizer, HYPER_LR)
            for batch in data:
                train(twin, optimizer, batch)
            rates += scheduler.get_last_lr()
        assert isinstance(optimizer.param_groups[0]["lr"], Tensor)
        assert rates[0] == pytest.approx(rates[1], rel=1e-12)

    def test_what_is_not_finite_changes_nothing(self) -> None:
        for lr in (LR, torch.tensor(LR)):
            x = nn.Parameter(torch.ones(3))
            optimizer = torch.optim.SGD([x], lr=lr)
            scheduler = HypergradientLR(optimizer, HYPER_LR)
            for value in (1.0, math.nan, 1.0):
                x.grad = torch.full_like(x, value)
                optimizer.step()
                assert scheduler.get_last_lr() == pytest.approx([LR])

    def test_gradients_that_somebody_writes_to(self) -> None:
        """The first is lost; from then on copies are kept."""
        x = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        optimizer = torch.optim.SGD([x], lr=0.0)
        scheduler = HypergradientLR(optimizer, 1.0)
        rates = []
        for value in (2.0, 3.0, 5.0, 7.0):
            optimizer.zero_grad(set_to_none=False)
            (value * x).sum().backward()
            optimizer.step()
            rates += scheduler.get_last_lr()
        assert rates == [0.0, 0.0, 15.0, 50.0]

    def test_parameters_without_a_gradient(self) -> None:
        x, y = (nn.Parameter(torch.zeros(1, dtype=torch.float64)) for _ in range(2))
        optimizer = torch.optim.SGD([x, y], lr=0.0)
        scheduler = HypergradientLR(optimizer, 1.0)
        for x_gradient, y_gradient in ((2.0, None), (3.0, 5.0), (None, 7.0)):
            for parameter, value in ((x, x_gradient), (y, y_gradient)):
                parameter.grad = None if value is None else torch.full_like(parameter, value)
            optimizer.step()
        assert scheduler.get_last_lr() == [6.0 + 35.0]

    def test_removed(self) -> None:
        model, data = mlp(), batches(3)
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        scheduler = HypergradientLR(optimizer, HYPER_LR)
        train(model, optimizer, data[0])
        scheduler.remove()
        for batch in data[1:]:
            train(model, optimizer, batch)
        assert scheduler.get_last_lr() == [LR]
        assert scheduler.state_dict()["directions"] == [None] * 4


class TestState:
    @EVERY
    def test_goes_on_as_if_never_stopped(self, make: Callable[..., torch.optim.Optimizer]) -> None:
        model, data = mlp(), batches(6)
        optimizer = make(model.parameters(), lr=LR)
        scheduler = HypergradientLR(optimizer, HYPER_LR)
        for batch in data[:3]:
            train(model, optimizer, batch)
        twin = copy.deepcopy(model)
        other = make(twin.parameters(), lr=1.0)
        resumed = HypergradientLR(other, 1.0)
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        resumed.load_state_dict(copy.deepcopy(scheduler.state_dict()))
        for batch in data[3:]:
            train(model, optimizer, batch)
            train(twin, other, batch)
        assert resumed.get_last_lr() == scheduler.get_last_lr()
        assert scheduler.get_last_lr() != [LR]

    def test_of_other_parameters(self) -> None:
        optimizer = torch.optim.SGD(mlp().parameters(), lr=LR)
        state = HypergradientLR(optimizer, HYPER_LR).state_dict()
        other = HypergradientLR(torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=LR), HYPER_LR)
        with pytest.raises(ValueError, match="of 4 parameters, and the optimizer has 2"):
            other.load_state_dict(state)


class TestRefusals:
    @pytest.mark.parametrize("kind", [torch.optim.RMSprop, torch.optim.Adagrad, object])
    def test_another_optimizer(self, kind: Any) -> None:
        optimizer = kind() if kind is object else kind(mlp().parameters())
        with pytest.raises(TypeError, match=f"{kind.__name__}; .*use one of these"):
            HypergradientLR(optimizer, HYPER_LR)

    def test_a_subclass(self) -> None:
        class Mine(torch.optim.SGD):
            pass

        with pytest.raises(TypeError, match="Mine"):
            HypergradientLR(Mine(mlp().parameters()), HYPER_LR)

    def test_maximize(self) -> None:
        optimizer = torch.optim.SGD(mlp().parameters(), lr=LR, maximize=True)
        with pytest.raises(ValueError, match="negate"):
            HypergradientLR(optimizer, HYPER_LR)

    @pytest.mark.parametrize("hyper_lr", [-1.0, math.nan, "1e-4", True, None])
    def test_no_such_rate(self, hyper_lr: Any) -> None:
        with pytest.raises(ValueError, match="hyper_lr is"):
            HypergradientLR(torch.optim.SGD(mlp().parameters(), lr=LR), hyper_lr)

    def test_a_closure(self) -> None:
        optimizer = torch.optim.SGD(mlp().parameters(), lr=LR)
        HypergradientLR(optimizer, HYPER_LR)
        for step in (
            lambda: optimizer.step(lambda: 1.0),
            lambda: optimizer.step(closure=lambda: 1.0),
        ):
            with pytest.raises(TypeError, match="closure"):
                step()

    def test_gradients_that_are_still_scaled(self) -> None:
        optimizer = torch.optim.SGD(mlp().parameters(), lr=LR, fused=True)
        HypergradientLR(optimizer, HYPER_LR)
        # As torch.amp.GradScaler hands it to a fused optimizer.
        optimizer.grad_scale = torch.tensor(2.0)
        with pytest.raises(ValueError, match="unscale_"):
            optimizer.step()
