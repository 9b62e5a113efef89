"""The equivalence certificate: what it finds, what it leaves alone, what it says."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import math
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tolerances
import torch
from reference.full_batch import full_batch, gradients_of, total_norm, total_relative_error
from torch import Tensor, nn
from torch.nn import functional

from sbp_fast import Certificate, StreamedAccumulator, verify
from sbp_fast.certificate import arguments, environment, tolerance
from sbp_fast.certificate.distance import VANISHING, Distance, Oracle
from sbp_fast.certificate.ways import Run, Ways
from sbp_fast.cli.demo_model import ResNet
from sbp_fast.memory import memory_budget

SAMPLES = 12
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"

pytestmark = pytest.mark.filterwarnings("ignore:.*batch norm layers:UserWarning")


@pytest.fixture(autouse=True)
def _no_leftovers() -> Iterator[None]:
    """Whatever a test does, the default dtype is back."""
    yield
    assert torch.get_default_dtype() is torch.float32


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 4))


def vectors(samples: int = SAMPLES) -> tuple[Tensor, Tensor]:
    return torch.randn(samples, 6), torch.randint(4, (samples,))


def conv_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 4)
    )


class TwoHeads(nn.Module):
    """Of two outputs, one comes through batch norm; under a squared error the other does not notice."""

    def __init__(self) -> None:
        super().__init__()
        self.free = nn.Linear(6, 3)
        self.normalised = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.free(x), self.normalised(x)], 1)


def two_heads() -> tuple[TwoHeads, nn.Module, Tensor, Tensor]:
    return TwoHeads(), nn.MSELoss(), torch.randn(SAMPLES, 6), torch.randn(SAMPLES, 6)


def token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """A mean over tokens that counts those other than -100."""
    return functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())


def ragged_tokens() -> tuple[nn.Module, Tensor, Tensor]:
    tokens = torch.randint(11, (SAMPLES, 7))
    lengths = torch.randint(1, 8, (SAMPLES, 1))
    model = nn.Sequential(nn.Embedding(11, 8), nn.Tanh(), nn.Linear(8, 11))
    return model, tokens, tokens.masked_fill(torch.arange(7) >= lengths, -100)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("make", [mlp, conv_net])
def test_holds_where_samples_do_not_meet(make: Callable[[], nn.Module], dtype: torch.dtype) -> None:
    inputs, targets = vectors()
    if make is conv_net:
        inputs = torch.randn(SAMPLES, 3, 6, 6)
    model = make().to(dtype)
    certificate = verify(model, nn.CrossEntropyLoss(), inputs.to(dtype), targets)
    assert certificate.holds
    assert certificate.first_broken is None
    assert certificate.plain_first_broken is None
    assert [total.micro_batch_size for total in certificate.totals] == [1, 5, 12]
    names = [name for name, _ in model.named_parameters()]
    assert [(row.parameter, row.micro_batch_size) for row in certificate.rows] == [
        (name, size) for name in names for size in (1, 5, 12)
    ]
    assert all(total.error <= tolerances.STEP[dtype] for total in certificate.totals)
    assert certificate.samples == certificate.samples_asked == SAMPLES
    assert certificate.environment["dtype"] == str(dtype).removeprefix("torch.")


def test_errors_are_those_of_the_gradients() -> None:
    """Against an oracle, an accumulator and a plain loop that share nothing with verify."""
    model, inputs, targets = ragged_tokens()
    certificate = verify(model, token_loss, inputs, targets, [5], normalization="tokens")
    oracle = full_batch(model, token_loss, inputs, targets)

    streamed = copy.deepcopy(model)
    optimizer = torch.optim.SGD(streamed.parameters())
    StreamedAccumulator(
        streamed, optimizer, token_loss, micro_batch_size=5, normalization="tokens"
    ).backward(inputs, targets)
    plain = copy.deepcopy(model)
    for start in (0, 5, 10):
        part = slice(start, start + 5)
        loss = token_loss(plain(inputs[part]), targets[part])
        (loss * (len(inputs[part]) / SAMPLES)).backward()

    total = certificate.totals[0]
    for error, plain_error, found in (
        (total.error, total.plain_error, None),
        *((row.error, row.plain_error, row) for row in certificate.rows),
    ):
        for measured, ours in ((error, streamed), (plain_error, plain)):
            gradients, expected = gradients_of(ours), dict(oracle.gradients)
            if found is not None:
                gradients = {found.parameter: gradients[found.parameter]}
                expected = {found.parameter: expected[found.parameter]}
                assert found.norm == pytest.approx(total_norm(expected))
            assert measured == pytest.approx(total_relative_error(gradients, expected))
    assert certificate.holds
    assert total.plain_error > 1e-2


def test_batch_norm_breaks_plain_accumulation_where_it_is() -> None:
    model, loss_fn, inputs, targets = two_heads()
    certificate = verify(model, loss_fn, inputs, targets, [12, 5], batch_norm="micro_batch")
    assert certificate.plain_first_broken is not None
    assert certificate.plain_first_broken[:3] == ("normalised.0", 5, "normalised.0.weight")
    assert certificate.plain_first_broken.error > 0.1
    # The accumulator was told to do the same.
    assert certificate.first_broken is not None
    assert certificate.first_broken.layer == "normalised.0"
    assert not certificate.holds
    whole, part = certificate.totals
    assert whole.error <= tolerances.STEP[torch.float32] < 0.1 < part.error
    untouched = [row for row in certificate.rows if row.layer == "free"]
    assert max(row.error for row in untouched) <= tolerances.STEP[torch.float32]


def test_wrong_normalization_is_found() -> None:
    model, inputs, targets = ragged_tokens()
    wrong = verify(model, token_loss, inputs, targets, normalization="mean")
    right = verify(model, token_loss, inputs, targets, normalization="tokens")
    assert not wrong.holds
    assert wrong.first_broken is not None
    assert wrong.first_broken[:2] == ("0", 1)
    assert right.holds
    assert right.plain_first_broken is not None


@pytest.mark.parametrize("normalization", ["auto", "inverse_sqrt"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_plain_accumulation_scales_as_the_loss_asks(reduction: str, normalization: str) -> None:
    loss_fn = nn.CrossEntropyLoss(reduction=reduction)
    certificate = verify(mlp(), loss_fn, *vectors(), normalization=normalization)
    assert certificate.holds
    assert certificate.plain_first_broken is None


def test_everything_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 4))
    model[3].requires_grad_(False)
    model[0].eval()
    loss_fn = nn.CrossEntropyLoss(weight=torch.rand(4))
    inputs, targets = vectors()
    inputs.requires_grad_()
    loss_fn(model(inputs), targets).backward()
    inputs.grad = None
    state = copy.deepcopy(model.state_dict())
    gradients = [parameter.grad for parameter in model.parameters()]
    values = copy.deepcopy(gradients)
    modes = [module.training for module in model.modules()]
    generators = [
        lambda: torch.get_rng_state().tolist(),
        lambda: np.random.get_state()[1].tolist(),
        random.getstate,
    ]
    before = [state() for state in generators]

    verify(model, loss_fn, inputs, targets, [5], seed=3, batch_norm="micro_batch", dropout="native")

    assert [state() for state in generators] == before
    assert torch.get_default_dtype() is torch.float32
    assert [module.training for module in model.modules()] == modes
    for parameter, gradient, value in zip(model.parameters(), gradients, values, strict=True):
        assert parameter.grad is gradient
        assert gradient is None or torch.equal(gradient, value)
    for name, value in model.state_dict().items():
        assert value.dtype == state[name].dtype
        assert torch.equal(value, state[name])
    assert loss_fn.weight is not None
    assert loss_fn.weight.dtype is torch.float32
    assert inputs.grad is None


def test_oracle_of_a_model_that_draws_is_the_accumulator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all samples at once, its own masks are the oracle's; of parts, torch's own are not."""
    streamed = Ways.streamed
    in_double: list[int] = []

    def watched(ways: Ways, micro_batch_size: int, *, double: bool = False) -> Run:
        if double:
            in_double.append(micro_batch_size)
        return streamed(ways, micro_batch_size, double=double)

    monkeypatch.setattr(Ways, "streamed", watched)
    # Two of them: the masks of one follow one another in the generator, in parts or not.
    model = nn.Sequential(nn.Linear(6, 32), nn.Dropout(0.5), nn.Dropout(0.2), nn.Linear(32, 4))
    certificate = verify(
        model.double(),
        nn.CrossEntropyLoss(),
        vectors()[0].double(),
        vectors()[1],
        [12, 5],
        dropout="native",
    )
    assert in_double == [12]
    assert "by the accumulator" in certificate.oracle
    whole, part = certificate.totals
    assert whole.error <= tolerances.STEP[torch.float64] < 0.1 < part.error
    model.eval()
    certificate = verify(model, nn.CrossEntropyLoss(), vectors()[0].double(), vectors()[1])
    assert in_double == [12]
    assert "by plain PyTorch" in certificate.oracle
    assert certificate.holds


def test_same_seed_same_certificate() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 4))
    inputs, targets = vectors()

    def errors(seed: int) -> list[float]:
        certificate = verify(
            model, nn.CrossEntropyLoss(), inputs, targets, [5], seed=seed, dropout="native"
        )
        return [row.plain_error for row in certificate.rows]

    first = errors(1)
    torch.rand(1)
    assert errors(1) == first
    assert errors(2) != first


def test_exception_of_a_split_is_a_finding() -> None:
    """Batch norm refuses a single sample. Where another size shows a layer, that is named."""
    model, loss_fn, inputs, targets = two_heads()
    for sizes, first in (([1, 5], ("normalised.0", 5)), ([1], ("free", 1))):
        certificate = verify(model, loss_fn, inputs, targets, sizes, batch_norm="micro_batch")
        single = certificate.totals[0]
        assert single.failure.startswith("ValueError: Expected more than 1 value per channel")
        assert single.failure == single.plain_failure
        assert single.error == math.inf
        assert certificate.first_broken is not None
        assert certificate.first_broken[:2] == first
        assert "sbp_fast at micro-batch size 1 ended in ValueError: Expected" in str(certificate)


def test_exception_of_the_whole_batch_is_raised() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        verify(mlp(), nn.CrossEntropyLoss(), torch.randn(12, 7), torch.randint(4, (12,)))


def test_gradients_that_are_not_finite() -> None:
    inputs, targets = vectors()
    inputs[3, 2] = math.inf
    certificate = verify(mlp(), nn.CrossEntropyLoss(), inputs, targets)
    assert not certificate.holds
    assert "own gradient of '0.weight' is not finite in float64" in str(certificate)


def test_overflow_in_the_models_own_dtype() -> None:
    """Finite in float64, but not in 16 bits."""

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(outputs.float(), targets) * 1e7

    inputs, targets = vectors()
    certificate = verify(mlp().half(), loss_fn, inputs.half(), targets, normalization="mean")
    assert certificate.rounding == math.inf
    assert certificate.tolerance == certificate.rows[0].tolerance == 5e-2
    assert not certificate.holds
    assert math.isfinite(certificate.rows[0].norm)


def test_gradients_that_vanish_are_measured_against_all() -> None:
    """A number added to all logits has no gradient: against nothing, any rounding would be too much."""

    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.shift = nn.Linear(6, 4), nn.Parameter(torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) + self.shift

    certificate = verify(Shifted(), nn.CrossEntropyLoss(), *vectors())
    shift = [row for row in certificate.rows if row.parameter == "shift"]
    assert shift[0].norm < 1e-12
    assert max(row.error for row in shift) > 0.0
    assert certificate.holds
    assert VANISHING == tolerances.VANISHING


def test_distance_where_figures_end() -> None:
    nan, one, zero = torch.tensor([math.nan]), torch.ones(1), torch.zeros(1)
    oracle = Oracle({"wild": nan, "tame": one, "none": zero})
    found = oracle.distance({"wild": one, "tame": 1.5 * one, "none": 0.5 * VANISHING * one})
    assert found.of == {"wild": math.inf, "tame": 0.5, "none": pytest.approx(0.5)}
    assert found.total == math.inf
    nothing = Oracle({"none": zero})
    assert nothing.distance({"none": zero}) == Distance(of={"none": 0.0}, total=0.0)
    assert nothing.distance({"none": one}) == Distance(of={"none": math.inf}, total=math.inf)


def test_parameters_without_a_gradient() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle, self.frozen = (nn.Linear(6, 4) for _ in range(3))
            self.frozen.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x) + self.frozen(x)

    certificate = verify(Idle(), nn.CrossEntropyLoss(), *vectors())
    assert {row.layer for row in certificate.rows} == {"used", "idle"}
    assert {row.error for row in certificate.rows if row.layer == "idle"} == {0.0}
    assert certificate.holds


def test_parameters_of_the_loss_come_last() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))

        def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
            return functional.cross_entropy(outputs * self.scale, targets)

    certificate = verify(mlp(), Scaled(), *vectors(), normalization="mean")
    assert certificate.rows[-1].parameter == "loss_fn.scale"
    assert certificate.rows[-1].norm > 0.0
    assert certificate.holds


@pytest.mark.parametrize(
    "wrap",
    [lambda loss: loss, lambda loss: {"loss": loss}, lambda loss: SimpleNamespace(loss=loss)],
)
def test_model_that_returns_its_own_loss(wrap: Callable[[Tensor], Any]) -> None:
    class OwnLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 4)

        def forward(self, x: Tensor, labels: Tensor) -> Any:
            return wrap(functional.cross_entropy(self.layer(x), labels))

    x, labels = vectors()
    for inputs in ((x, labels), {"x": x, "labels": labels}):
        assert verify(OwnLoss(), None, inputs, normalization="mean").holds


def test_what_a_model_makes_by_itself_is_in_float64_too() -> None:
    """The demo's model casts bytes to the default dtype; a loss keeps class weights in a partial."""
    images = np.random.default_rng(0).integers(0, 256, (6, 28, 28), dtype=np.uint8)
    loss_fn = functools.partial(functional.cross_entropy, weight=torch.rand(10))
    certificate = verify(ResNet(width=8), loss_fn, images, torch.randint(10, (6,)), [4])
    assert certificate.holds
    assert certificate.plain_first_broken is not None


def test_surroundings_do_not_matter() -> None:
    inputs, targets = vectors()
    model = mlp()
    expected = verify(model, nn.CrossEntropyLoss(), inputs, targets).rows
    with torch.no_grad():
        assert verify(model, nn.CrossEntropyLoss(), inputs, targets).rows == expected


@pytest.mark.parametrize("surrounding", [False, True])
def test_autocast_is_compared_as_16_bits(surrounding: bool) -> None:
    inputs, targets = vectors()
    with torch.autocast("cpu", torch.bfloat16, enabled=surrounding):
        certificate = verify(
            mlp(),
            nn.CrossEntropyLoss(),
            inputs,
            targets,
            autocast=None if surrounding else torch.bfloat16,
        )
    assert certificate.tolerance == tolerances.STEP[torch.bfloat16]
    assert certificate.environment["dtype"] == "bfloat16 and float32"
    # The oracle was not narrowed: what is computed with 8 bits is far from it.
    assert 1e-4 < certificate.totals[0].error < certificate.tolerance
    assert certificate.holds


@pytest.mark.parametrize("surrounding", [False, True])
def test_oracle_is_not_under_autocast(surrounding: bool) -> None:
    """Models ask, and narrow by themselves what autocast leaves alone."""
    seen: set[tuple[bool, torch.dtype]] = set()

    class Asking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            seen.add((torch.is_autocast_enabled("cpu"), x.dtype))
            return self.layer(functional.dropout(x, 0.5))

    with torch.autocast("cpu", torch.bfloat16, enabled=surrounding):
        verify(
            Asking(),
            nn.CrossEntropyLoss(),
            *vectors(),
            dropout="native",
            autocast=None if surrounding else torch.bfloat16,
        )
    assert seen == {(True, torch.float32), (False, torch.float64)}


def test_autocast_object_that_is_off_narrows_nothing() -> None:
    for enabled, usual in ((True, 5e-2), (False, 1e-5)):
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=enabled)
        certificate = verify(mlp(), nn.CrossEntropyLoss(), *vectors(), autocast=autocast)
        assert certificate.tolerance == usual
        assert certificate.holds


class TestTolerance:
    def test_usual_ones_are_the_promise(self) -> None:
        for dtype, promised in tolerances.STEP.items():
            assert tolerance.usual_tolerance({dtype}) == promised
        assert tolerance.usual_tolerance({torch.float64, torch.float32}) == 1e-5

    def test_rounding_of_the_whole_batch_is_allowed(self) -> None:
        at_once = Distance(of={"a": 3e-4, "b": 1e-9}, total=1e-4)
        each = tolerance.tolerance_of_each(1e-5, at_once, {torch.float32})
        assert each == {"a": pytest.approx(12e-4), "b": pytest.approx(4e-4)}
        small = Distance(of={"a": 1e-7}, total=1e-7)
        assert tolerance.tolerance_of_each(1e-5, small, {torch.float32}) == {"a": 1e-5}

    def test_no_rounding_is_that_large(self) -> None:
        at_once = Distance(of={"a": 0.5}, total=0.3)
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            assert tolerance.tolerance_of_each(1e-5, at_once, {dtype}) == {"a": 1e-5}

    def test_each_parameter_has_its_own(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tolerance, "MARGIN", 1e5)
        certificate = verify(mlp(), nn.CrossEntropyLoss(), *vectors())
        assert min(row.tolerance for row in certificate.rows) > certificate.tolerance == 1e-5
        assert len({row.tolerance for row in certificate.rows}) > 1

    def test_one_that_is_given_is_taken_as_it_is(self) -> None:
        certificate = verify(mlp(), nn.CrossEntropyLoss(), *vectors(), tolerance=1e-12)
        assert {row.tolerance for row in certificate.rows} == {1e-12}
        assert not certificate.holds


class TestMemory:
    def test_batch_is_halved_until_it_fits(self) -> None:
        model = nn.Sequential(nn.Linear(6, 2000), nn.Tanh(), nn.Linear(2000, 4))
        inputs, targets = vectors(200)
        with memory_budget("cpu", "4MiB"):
            certificate = verify(model, nn.CrossEntropyLoss(), inputs, targets, [150, 20, 200])
        assert certificate.samples == 50
        assert certificate.samples_asked == 200
        assert [total.micro_batch_size for total in certificate.totals] == [50, 20]
        assert "the first of 200 samples: more do not fit" in str(certificate)
        assert certificate.holds

    def test_single_sample_that_does_not_fit_is_an_error(self) -> None:
        model = nn.Sequential(nn.Linear(6, 2000), nn.Tanh(), nn.Linear(2000, 4))
        with memory_budget("cpu", "100KiB"), pytest.raises(torch.OutOfMemoryError):
            verify(model, nn.CrossEntropyLoss(), *vectors())

    def test_samples_are_the_first(self) -> None:
        inputs, targets = vectors()
        inputs[7:] = math.nan
        certificate = verify(mlp(), nn.CrossEntropyLoss(), inputs, targets, samples=7)
        assert certificate.samples == certificate.samples_asked == 7
        assert certificate.holds


@pytest.mark.parametrize("samples", range(1, 20))
def test_usual_sizes(samples: int) -> None:
    sizes = arguments.usual_sizes(samples)
    assert sizes == sorted(set(sizes))
    assert sizes[0] == 1
    assert sizes[-1] == samples
    if samples > 2:
        assert len(sizes) == 3
        assert samples % sizes[1]


def test_float64_is_computed_on_the_cpu_where_the_device_has_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def zeros(*_: Any, **__: Any) -> Tensor:
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype")

    device = torch.device("meta")
    assert environment.device_for_double(device) == device
    monkeypatch.setattr(torch, "zeros", zeros)
    assert environment.device_for_double(device) == torch.device("cpu")


class TestBadInput:
    """Nothing has run when these are raised."""

    @pytest.fixture
    def silent(self) -> nn.Module:
        class Silent(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Linear(6, 4)

            def forward(self, x: Tensor) -> Tensor:
                raise AssertionError("ran")

        return Silent()

    @pytest.mark.parametrize(
        ("changed", "kind", "message"),
        [
            (
                {"micro_batch_sizes": []},
                ValueError,
                "micro_batch_sizes is empty; give at least one",
            ),
            ({"micro_batch_sizes": 4}, TypeError, "micro_batch_sizes is 4; it must be a sequence"),
            ({"micro_batch_sizes": "12"}, TypeError, "'12'; it must be a sequence of ints"),
            ({"micro_batch_sizes": [1.0]}, TypeError, "holds 1.0; it must hold ints"),
            ({"micro_batch_sizes": [True]}, TypeError, "holds True; it must hold ints"),
            ({"micro_batch_sizes": [0]}, ValueError, "holds 0; each must be from 1 to 12"),
            ({"micro_batch_sizes": [13]}, ValueError, "holds 13; each must be .* or pass a larger"),
            ({"micro_batch_sizes": [8], "samples": 7}, ValueError, "holds 8; .* from 1 to 7"),
            ({"samples": 0}, ValueError, "samples is 0; it must be from 1 to 12"),
            ({"samples": 13}, ValueError, "samples is 13; it must be from 1 to 12"),
            ({"samples": 3.0}, TypeError, "samples is 3.0; it must be an int"),
            (
                {"tolerance": 0.0},
                ValueError,
                "tolerance is 0.0; it must be a finite number greater",
            ),
            ({"tolerance": math.nan}, ValueError, "tolerance is nan"),
            ({"tolerance": "small"}, TypeError, "tolerance is 'small'; it must be a number"),
            ({"seed": 1.5}, TypeError, "seed is 1.5; it must be an int"),
            ({"targets": None}, ValueError, "targets are None although there is a loss_fn"),
            (
                {"inputs": torch.randn(11, 6)},
                ValueError,
                "targets has 12 samples but inputs has 11",
            ),
            ({"inputs": torch.randn(0, 6)}, ValueError, "samples"),
            (
                {"inputs": iter([])},
                TypeError,
                r"a list_iterator, a stream .* next\(iter\(loader\)\)",
            ),
            ({"loss_fn": 3}, TypeError, "loss_fn is 3; it must be callable"),
            ({"loss_fn": token_loss}, ValueError, "cannot see how loss_fn=token_loss averages"),
            ({"normalization": "median"}, ValueError, "normalization is 'median'"),
            ({"batch_norm": "none"}, ValueError, "batch_norm is 'none'; it must be one of"),
            ({"autocast": torch.int8}, ValueError, "autocast is torch.int8"),
            ({"micro_batch_size": 4}, TypeError, "no option of verify; pass all of them as micro_"),
            (
                {"max_grad_norm": 1.0},
                TypeError,
                "max_grad_norm is no option of verify; leave it out",
            ),
            ({"grad_scaler": None}, TypeError, "grad_scaler is no option of verify; leave it out"),
            ({"optimiser": None}, TypeError, "'optimiser' is no option .* are .*normalization"),
        ],
    )
    def test_is_named_with_its_cure(
        self, silent: nn.Module, changed: dict[str, Any], kind: type[Exception], message: str
    ) -> None:
        inputs, targets = vectors()
        given = {"inputs": inputs, "targets": targets, "loss_fn": nn.CrossEntropyLoss()}
        with pytest.raises(kind, match=message):
            verify(silent, **{**given, **changed})

    def test_model_without_trainable_parameters(self) -> None:
        with pytest.raises(ValueError, match="none of which requires a gradient"):
            verify(mlp().requires_grad_(False), nn.CrossEntropyLoss(), *vectors())

    @pytest.mark.parametrize(
        ("loss_fn", "what"),
        [
            (lambda outputs, _: outputs, r"of shape \(12, 4\)"),
            (lambda outputs, _: outputs.sum().item(), "float"),
            (lambda outputs, _: None, "NoneType"),
            (lambda outputs, _: outputs.detach().sum(), r"of shape \(\)"),
        ],
    )
    def test_loss_that_is_none(self, loss_fn: Callable[..., Any], what: str) -> None:
        with pytest.raises(ValueError, match=rf"the loss \({what}\) must be a tensor with one"):
            verify(mlp(), loss_fn, *vectors(), normalization="mean")

    def test_model_that_cannot_be_copied(self) -> None:
        model = mlp()
        model.kept = model(vectors()[0])
        with pytest.raises(ValueError, match=r"cannot be copied .* detach the tensors"):
            verify(model, nn.CrossEntropyLoss(), *vectors())

    def test_loss_that_stays_in_float32(self) -> None:
        weight = torch.rand(4)

        def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
            return functional.cross_entropy(outputs, targets, weight)

        with pytest.raises(ValueError, match=r"cannot be computed in float64 .* as buffers"):
            verify(mlp(), loss_fn, *vectors(), normalization="mean")

    def test_loss_that_holds_the_model_from_outside(self) -> None:
        model = mlp()
        before = [torch.ones_like(parameter) for parameter in model.parameters()]
        for parameter, gradient in zip(model.parameters(), before, strict=True):
            parameter.grad = gradient

        def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
            decay = sum(parameter.square().sum() for parameter in model.parameters())
            return functional.cross_entropy(outputs, targets) + decay

        with pytest.raises(
            ValueError, match=r"reached the model itself .* make it a torch.nn.Module"
        ):
            verify(model, loss_fn, *vectors(), normalization="mean")
        for parameter, gradient in zip(model.parameters(), before, strict=True):
            assert parameter.grad is gradient

    def test_loss_that_is_copied_with_the_model(self) -> None:
        class Decaying(nn.Module):
            def __init__(self, model: nn.Module) -> None:
                super().__init__()
                self.model = model

            def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
                decay = sum(parameter.square().sum() for parameter in self.model.parameters())
                return functional.cross_entropy(outputs, targets) + decay

        model = mlp()
        certificate = verify(model, Decaying(model), *vectors(), normalization="mean")
        assert certificate.holds
        assert len({row.parameter for row in certificate.rows}) == 4


class TestReport:
    @pytest.fixture
    def broken(self) -> Certificate:
        """One size is off, one failed, one holds."""
        model, loss_fn, inputs, targets = two_heads()
        return verify(model, loss_fn, inputs, targets, [1, 5, 12], batch_norm="micro_batch")

    @pytest.fixture
    def holding(self) -> Certificate:
        return verify(mlp(), nn.CrossEntropyLoss(), *vectors())

    def test_words(self, broken: Certificate, holding: Certificate) -> None:
        text = str(broken)
        assert "12 samples, float32 on cpu" in text
        assert "by plain PyTorch, in float64 on cpu" in text
        assert re.search(r"^micro-batch size 1 +failed +failed$", text, re.MULTILINE)
        assert re.search(r"^micro-batch size 5 +\d\.\de-01 +\d\.\de-01$", text, re.MULTILINE)
        layers = [line.split()[0] for line in text.split("\n\n")[2].splitlines()[2:]]
        assert layers[-1] == "free"
        assert set(layers) == {"normalised.0", "normalised.1", "normalised.2", "free"}
        found = "BROKEN: first in layer 'normalised.0' at micro-batch size 5"
        assert text.splitlines()[-2].startswith(f"sbp_fast            {found}")
        assert text.splitlines()[-1].startswith(f"plain accumulation  {found}")
        assert "\nPut down to rounding: 1.0e-05" in text
        assert re.search(
            r"^Rounding of the whole batch at once in float32: \d\.\de-0[78]$", text, re.M
        )
        assert str(holding).splitlines()[-2].startswith("sbp_fast            HOLDS")

    def test_layers_that_are_off_come_first(self, holding: Certificate) -> None:
        rows = tuple(
            dataclasses.replace(
                row,
                error=1e-3 if row.layer == "2" else 0.0,
                plain_error=0.0 if row.layer == "2" else 1.0,
            )
            for row in holding.rows
        )
        for tolerated, order in ((1e-5, ["2", "0"]), (1e-2, ["0", "2"])):
            text = str(
                dataclasses.replace(
                    holding,
                    rows=tuple(dataclasses.replace(row, tolerance=tolerated) for row in rows),
                )
            )
            layers = text.split("\n\n")[2].splitlines()[2:]
            assert [line.split()[0] for line in layers] == order

    def test_words_where_one_parameter_rounds_more(self, holding: Certificate) -> None:
        first, *others = holding.rows
        row = dataclasses.replace(first, tolerance=4.2e-5, error=3e-5)
        certificate = dataclasses.replace(holding, rows=(row, *others))
        assert certificate.holds
        assert "1.0e-05, up to 4.2e-05 where the whole batch at once rounds more" in str(
            certificate
        )
        assert "rounds more" not in str(holding)

    def test_words_where_rounding_hides_much(self, holding: Certificate) -> None:
        advice = "cannot be seen in float32: to see it, verify the model in float64"
        assert advice not in str(holding)
        assert advice in str(dataclasses.replace(holding, rounding=1e-3))

    def test_json_comes_back_as_it_was(
        self, broken: Certificate, holding: Certificate, tmp_path: Path
    ) -> None:
        for certificate in (broken, holding):
            certificate.save(tmp_path / "certificate.json")
            assert Certificate.load(tmp_path / "certificate.json") == certificate

    def test_json_is_for_other_programs_too(self, broken: Certificate, tmp_path: Path) -> None:
        broken.save(tmp_path / "certificate.json")
        content = json.loads(
            (tmp_path / "certificate.json").read_text(), parse_constant=pytest.fail
        )
        assert content["schema"] == "sbp_fast.certificate"
        assert content["version"] == 1
        assert content["holds"] is False
        assert content["first_broken"]["layer"] == "normalised.0"
        assert content["rows"][0]["error"] is None
        assert content["environment"]["torch"] == torch.__version__
        assert content["environment"]["options"] == "batch_norm='micro_batch'"

    def test_json_of_another_version_is_refused(self, holding: Certificate, tmp_path: Path) -> None:
        path = tmp_path / "certificate.json"
        holding.save(path)
        path.write_text(path.read_text().replace('"version": 1', '"version": 2'))
        with pytest.raises(
            ValueError, match=r"version 2; expected 'sbp_fast.certificate', version 1"
        ):
            Certificate.load(path)

    def test_figure(self, broken: Certificate, holding: Certificate, tmp_path: Path) -> None:
        for certificate in (broken, holding):
            certificate.plot(tmp_path / "certificate.png")
            assert (tmp_path / "certificate.png").read_bytes().startswith(PNG_SIGNATURE)

    def test_figure_shows_both_and_the_tolerance(self, broken: Certificate) -> None:
        from matplotlib.figure import Figure

        from sbp_fast.report.certificate_plot import draw_errors

        axes = Figure().subplots()
        draw_errors(axes, broken)
        assert axes.get_yscale() == "log"
        lines = {str(line.get_label()): line for line in axes.get_lines()}
        assert len(lines) == 7
        low, high = axes.get_ylim()
        assert list(lines["sbp_fast, micro-batch 1"].get_ydata()) == [high] * 4
        plain = list(lines["plain, micro-batch 5"].get_ydata())
        assert plain[0] < 1e-5 < 0.1 < min(plain[1:])
        assert min(lines["tolerance"].get_ydata()) == broken.tolerance
        assert low < min(plain)
        assert [label.get_text() for label in axes.get_xticklabels()] == [
            "free",
            "normalised.0",
            "normalised.1",
            "normalised.2",
        ]
        assert [text.get_text() for text in axes.texts] == ["no finite gradient"]
