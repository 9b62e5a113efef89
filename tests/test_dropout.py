"""Dropout per sample in a step: the masks that were promised, whatever the split."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import tolerances
import torch
from reference.full_batch import assert_gradients_match, full_batch, gradients_of
from reference.masks import keep_mask
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from sbp_fast import StreamedAccumulator

SAMPLES = 11
SEED = 1234


class DropPath(nn.Module):
    """As timm writes it."""

    def __init__(self, drop_prob: float, scale_by_keep: bool = True) -> None:
        super().__init__()
        self.drop_prob = drop_prob
        self.scale_by_keep = scale_by_keep

    def forward(self, x: Tensor) -> Tensor:
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep = 1 - self.drop_prob
        mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep)
        return x * (mask.div_(keep) if self.scale_by_keep else mask)


class StochasticDepth(nn.Module):
    """As torchvision writes it."""

    def __init__(self, p: float, mode: str) -> None:
        super().__init__()
        self.p = p
        self.mode = mode

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0.0:
            return x
        rows = x.shape[0] if self.mode == "row" else 1
        noise = x.new_empty([rows] + [1] * (x.ndim - 1)).bernoulli_(1 - self.p)
        return x * noise.div_(1 - self.p)


class Applied(nn.Module):
    """Something random between two linear maps of inputs of any shape."""

    def __init__(self, random: nn.Module, *shape: int) -> None:
        super().__init__()
        self.before = nn.Linear(shape[-1], shape[-1])
        self.random = random
        self.after = nn.Linear(shape[-1], 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.random(self.before(x))).flatten(1).mean(1, keepdim=True)


def make_batch(*shape: int) -> tuple[Tensor, Tensor]:
    return torch.randn(SAMPLES, *shape, dtype=torch.float64), torch.randn(SAMPLES, 1).double()


def accumulate(
    model: nn.Module, inputs: Any, targets: Tensor, size: int, seed: int = SEED, **options: Any
) -> dict[str, Tensor | None]:
    model = copy.deepcopy(model)
    accumulator = StreamedAccumulator(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        nn.MSELoss(),
        micro_batch_size=size,
        **options,
    )
    torch.manual_seed(seed)
    accumulator.backward(inputs, targets)
    return gradients_of(model)


def step_seed(seed: int = SEED) -> int:
    torch.manual_seed(seed)
    return int(torch.randint(2**63 - 1, ()))


def channel_mask(shape: tuple[int, ...], dims: int, probability: float, call: int = 0) -> Tensor:
    elements = int(torch.Size(shape[1:dims]).numel())
    mask = keep_mask(
        probability, seed=step_seed(), call=call, samples=range(SAMPLES), elements=elements
    )
    return mask.view(*shape[:dims], *[1] * (len(shape) - dims))


class Fixed(nn.Module):
    """The oracle's stand-in for something random: ``x * scale + shift``."""

    def __init__(self, scale: Tensor, shift: Tensor | float = 0.0) -> None:
        super().__init__()
        self.scale = scale
        self.shift = shift

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


def alpha_oracle(keep: Tensor, p: float) -> Fixed:
    alpha = 1.7580993408473766
    a = ((1 - p) * (1 + p * alpha**2)) ** -0.5
    b = a * alpha * p
    return Fixed(keep * a, (1 - keep) * (-alpha * a) + b)


CASES: dict[str, tuple[nn.Module, tuple[int, ...], Callable[[tuple[int, ...]], nn.Module]]] = {
    "dropout": (nn.Dropout(0.3), (7,), lambda s: Fixed(channel_mask(s, 2, 0.3) / 0.7)),
    "in_place": (
        nn.Dropout(0.3, inplace=True),
        (3, 7),
        lambda s: Fixed(channel_mask(s, 3, 0.3) / 0.7),
    ),
    "all_dropped": (nn.Dropout(1.0), (7,), lambda s: Fixed(torch.zeros(s).double())),
    "1d": (nn.Dropout1d(0.4), (5, 7), lambda s: Fixed(channel_mask(s, 2, 0.4) / 0.6)),
    "2d": (nn.Dropout2d(0.4), (5, 3, 7), lambda s: Fixed(channel_mask(s, 2, 0.4) / 0.6)),
    "3d": (nn.Dropout3d(0.4), (5, 2, 3, 7), lambda s: Fixed(channel_mask(s, 2, 0.4) / 0.6)),
    "alpha": (nn.AlphaDropout(0.2), (7,), lambda s: alpha_oracle(channel_mask(s, 2, 0.2), 0.2)),
    "feature_alpha": (
        nn.FeatureAlphaDropout(0.2),
        (5, 7),
        lambda s: alpha_oracle(channel_mask(s, 2, 0.2), 0.2),
    ),
    "timm": (DropPath(0.4), (3, 7), lambda s: Fixed(channel_mask(s, 1, 0.4) / 0.6)),
    "timm_unscaled": (DropPath(0.4, False), (3, 7), lambda s: Fixed(channel_mask(s, 1, 0.4))),
    "torchvision_row": (
        StochasticDepth(0.4, "row"),
        (3, 7),
        lambda s: Fixed(channel_mask(s, 1, 0.4) / 0.6),
    ),
    "torchvision_batch": (
        StochasticDepth(0.5, "batch"),
        (3, 7),
        lambda s: Fixed(channel_mask(s, 1, 0.5)[:1] / 0.5),
    ),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    """A model, its oracle, inputs and targets."""
    random, shape, make_oracle = CASES[request.param]
    model = Applied(random, *shape).double()
    inputs, targets = make_batch(*shape)
    oracle = copy.deepcopy(model)
    oracle.random = make_oracle(tuple(inputs.shape))
    return model, oracle, inputs, targets


class TestMasks:
    @pytest.mark.parametrize("size", [1, 4, SAMPLES])
    def test_are_those_of_the_contract(
        self, case: tuple[nn.Module, nn.Module, Tensor, Tensor], size: int
    ) -> None:
        model, oracle, inputs, targets = case
        expected = full_batch(oracle, nn.MSELoss(), inputs, targets).gradients
        found = accumulate(model, inputs, targets, size)
        assert_gradients_match(found, expected, tolerances.STEP[torch.float64])

    def test_eval_mode_drops_nothing(
        self, case: tuple[nn.Module, nn.Module, Tensor, Tensor]
    ) -> None:
        model, _, inputs, targets = case
        model.eval()
        expected = full_batch(model, nn.MSELoss(), inputs, targets).gradients
        found = accumulate(model, inputs, targets, 4)
        assert_gradients_match(found, expected, tolerances.STEP[torch.float64])


class TwoCalls(nn.Module):
    def __init__(self, use_checkpoint: str = "") -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 1)
        self.dropout = nn.Dropout(0.4)
        self.use_checkpoint = use_checkpoint

    def body(self, x: Tensor) -> Tensor:
        return self.dropout(torch.tanh(self.second(self.dropout(x))))

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(torch.tanh(self.first(x)))
        if self.use_checkpoint:
            x = checkpoint(self.body, x, use_reentrant=self.use_checkpoint == "reentrant")
            x = checkpoint(self.body, x, use_reentrant=self.use_checkpoint == "reentrant")
        else:
            x = self.body(self.body(x))
        return self.last(x)


class TestCalls:
    def test_of_one_layer_have_their_own_masks(self) -> None:
        model = TwoCalls().double()
        inputs, targets = make_batch(6)
        masks = iter([channel_mask((SAMPLES, 8), 2, 0.4, call) / 0.6 for call in range(5)])
        oracle = copy.deepcopy(model)
        oracle.dropout = nn.Identity()
        oracle.dropout.forward = lambda x: x * next(masks)  # type: ignore[method-assign]
        expected = full_batch(oracle, nn.MSELoss(), inputs, targets).gradients
        for size in (1, 4, SAMPLES):
            masks = iter([channel_mask((SAMPLES, 8), 2, 0.4, call) / 0.6 for call in range(5)])
            found = accumulate(model, inputs, targets, size)
            assert_gradients_match(found, expected, tolerances.STEP[torch.float64])

    @pytest.mark.parametrize("kind", ["non-reentrant", "reentrant"])
    def test_in_a_checkpoint_come_back_in_backward(self, kind: str) -> None:
        model = TwoCalls(kind).double()
        plain = TwoCalls().double()
        plain.load_state_dict(model.state_dict())
        inputs, targets = make_batch(6)
        for size in (3, SAMPLES):
            assert_gradients_match(
                accumulate(model, inputs, targets, size),
                accumulate(plain, inputs, targets, SAMPLES),
                tolerances.STEP[torch.float64],
            )

    def test_in_a_checkpoint_that_forgets_random_numbers_are_refused(self) -> None:
        model = TwoCalls().double()
        body = model.body
        model.body = lambda x: checkpoint(  # type: ignore[method-assign]
            body, x, use_reentrant=False, preserve_rng_state=False
        )
        inputs, targets = make_batch(6)
        accumulator = StreamedAccumulator(
            model, torch.optim.SGD(model.parameters(), lr=0.1), nn.MSELoss(), micro_batch_size=4
        )
        with pytest.raises(RuntimeError, match=r"'dropout'.*preserve_rng_state=True"):
            accumulator.backward(inputs, targets)


class TestSeed:
    @pytest.fixture
    def model(self) -> nn.Module:
        return TwoCalls().double()

    def test_the_same_seed_gives_the_same_masks(self, model: nn.Module) -> None:
        inputs, targets = make_batch(6)
        first, again, other = (
            accumulate(model, inputs, targets, 4, seed)["first.weight"] for seed in (1, 1, 2)
        )
        assert first is not None
        assert again is not None
        assert other is not None
        assert torch.equal(first, again)
        assert float((first - other).norm() / first.norm()) > 0.1

    def test_every_step_has_its_own(self, model: nn.Module) -> None:
        inputs, targets = make_batch(6)
        accumulator = StreamedAccumulator(
            model, torch.optim.SGD(model.parameters(), lr=0.0), nn.MSELoss(), micro_batch_size=4
        )
        losses = {float(accumulator.step(inputs, targets).loss) for _ in range(5)}
        assert len(losses) == 5

    def test_a_step_moves_the_generator_by_the_same_distance(self, model: nn.Module) -> None:
        inputs, targets = make_batch(6)
        after = set()
        for size in (1, 4, SAMPLES):
            accumulate(model, inputs, targets, size)
            after.add(int(torch.randint(2**62, ())))
        assert after == {self.second_number()}

    @staticmethod
    def second_number() -> int:
        step_seed()
        return int(torch.randint(2**62, ()))

    def test_an_exception_leaves_the_generator_as_it_was(self, model: nn.Module) -> None:
        inputs, targets = make_batch(6)

        def fail(outputs: Tensor, targets: Tensor) -> Tensor:
            raise ZeroDivisionError

        accumulator = StreamedAccumulator(
            model,
            torch.optim.SGD(model.parameters(), lr=0.0),
            fail,
            micro_batch_size=4,
            normalization="mean",
        )
        state = torch.get_rng_state()
        with pytest.raises(ZeroDivisionError):
            accumulator.step(inputs, targets)
        assert torch.equal(torch.get_rng_state(), state)

    def test_draws_of_the_model_itself_differ_between_micro_batches(self) -> None:
        drawn = []

        class Noisy(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.linear = nn.Linear(6, 1)

            def forward(self, x: Tensor) -> Tensor:
                drawn.append(float(torch.rand(())))
                return self.linear(x)

        inputs, targets = make_batch(6)
        accumulate(Noisy().double(), inputs, targets, 4)
        first = list(drawn)[-3:]
        assert len(set(first)) == 3
        accumulate(Noisy().double(), inputs, targets, 4)
        assert drawn[-3:] == first


class TestNothingIsLeft:
    def test_functions_and_modules_are_torchs_own_again(self) -> None:
        before = {name: getattr(functional, name) for name in dir(functional)}
        model = Applied(DropPath(0.4), 7).double()
        inputs, targets = make_batch(7)
        accumulate(model, inputs, targets, 4)
        assert {name: getattr(functional, name) for name in dir(functional)} == before
        accumulator = StreamedAccumulator(
            model, torch.optim.SGD(model.parameters(), lr=0.1), nn.MSELoss(), micro_batch_size=4
        )
        accumulator.step(inputs, targets)
        assert "forward" not in vars(model.random)
        with pytest.raises(RuntimeError, match="mat1 and mat2"):
            accumulator.step(torch.randn(SAMPLES, 3).double(), targets)
        assert "forward" not in vars(model.random)
        assert functional.dropout is before["dropout"]

    def test_others_keep_their_dropout(self) -> None:
        """A generator that computes with a model of its own is not part of the step."""
        model, teacher = TwoCalls().double(), TwoCalls().double()
        inputs, targets = make_batch(6)
        made: list[Tensor] = []

        def micro_batches() -> Any:
            for rows in range(0, SAMPLES, 4):
                torch.manual_seed(rows)
                made.append(teacher(inputs[rows : rows + 4]).detach())
                yield inputs[rows : rows + 4], targets[rows : rows + 4]

        accumulator = StreamedAccumulator(
            model, torch.optim.SGD(model.parameters(), lr=0.1), nn.MSELoss(), micro_batch_size=4
        )
        accumulator.step(micro_batches())
        for rows, outputs in zip(range(0, SAMPLES, 4), made, strict=True):
            torch.manual_seed(rows)
            assert torch.equal(teacher(inputs[rows : rows + 4]), outputs)
