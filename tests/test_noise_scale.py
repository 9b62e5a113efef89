"""The gradient noise scale, on losses whose noise is known."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from out_of_memory import Failing
from torch import Tensor, nn

from sbp_fast import StepResult, StreamedAccumulator
from sbp_fast.tuning import NoiseScale, NoiseScaleEstimator
from sbp_fast.tuning.confidence import Means, student_quantile
from sbp_fast.tuning.noise_estimator import Comparison

SIZE = 12
# Standard errors of a mean that is without bias. Four are exceeded once in 16,000 times.
SURELY_BIASED = 4.0


class Quadratic(nn.Module):
    """Of one sample ``x``: ``sum(h p^2) / 2 + x . p``. Its gradient is ``h p``, plus noise ``x``."""

    def __init__(self, dtype: torch.dtype = torch.float64, size: float = 0.1) -> None:
        super().__init__()
        curvature = torch.linspace(0.5, 1.5, SIZE, dtype=dtype)
        self.register_buffer("curvature", curvature)
        self.point = nn.Parameter(torch.full((SIZE,), size, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.point + (self.curvature * self.point.square()).sum() / 2

    def gradient_squared(self) -> float:
        return float((self.curvature * self.point.detach()).double().square().sum())


def mean(outputs: Tensor, targets: Tensor) -> Tensor:
    """Of what is not ignored."""
    return outputs[targets == 0].mean()


def total(outputs: Tensor, targets: Tensor) -> Tensor:
    return outputs[targets == 0].sum()


def batch(samples: int, dtype: torch.dtype = torch.float64, noise: float = 1.0) -> tuple[Any, Any]:
    return noise * torch.randn(samples, SIZE, dtype=dtype), torch.zeros(samples)


def accumulator_for(
    model: nn.Module, micro_batch_size: int = 7, loss_fn: Any = mean, **options: Any
) -> StreamedAccumulator:
    options = {"normalization": "mean", "probe": False, "noise_scale": True, **options}
    return StreamedAccumulator(
        model,
        torch.optim.SGD(model.parameters(), lr=0.0),
        loss_fn,
        micro_batch_size=micro_batch_size,
        **options,
    )


def single_steps(
    accumulator: StreamedAccumulator, estimator: NoiseScaleEstimator, batches: Iterator[Any]
) -> Tensor:
    """What each large batch by itself says of the covariance and of the gradient; shape (steps, 2)."""
    fresh = estimator.state_dict()
    rows = []
    for given in batches:
        estimator.load_state_dict({**fresh, "decay": 0.0})
        noise_scale = accumulator.backward(*given).noise_scale
        assert noise_scale is not None
        rows.append([noise_scale.covariance, noise_scale.gradient_squared])
    return torch.tensor(rows, dtype=torch.float64)


def check_unbiased(rows: Tensor, covariance: float, gradient_squared: float) -> None:
    errors = rows.std(0) / len(rows) ** 0.5
    distances = (rows.mean(0) - torch.tensor([covariance, gradient_squared])) / errors
    assert float(distances.abs().max()) < SURELY_BIASED, (distances, rows.mean(0))
    # And the figures are known well enough to tell.
    assert float(errors[0]) < 0.12 * covariance
    assert float(errors[1]) < 0.12 * gradient_squared


def uneven(samples: int) -> Iterator[tuple[Tensor, Tensor]]:
    """A stream whose items have sizes of their own."""
    sizes = [3, 25, 1, samples - 29]
    for size in sizes:
        yield batch(size)


class TestUnbiased:
    @pytest.mark.parametrize("micro_batch_size", [3, 7, 45])
    @pytest.mark.usefixtures("adding")
    def test_every_split(self, micro_batch_size: int) -> None:
        model, estimator = Quadratic(), NoiseScaleEstimator()
        accumulator = accumulator_for(model, micro_batch_size, noise_scale=estimator)
        batches = (batch(100) for _ in range(100))
        check_unbiased(
            single_steps(accumulator, estimator, batches), SIZE, model.gradient_squared()
        )

    @pytest.mark.parametrize(
        ("loss_fn", "normalization"),
        [(mean, "mean"), (total, "sum"), (mean, "inverse_sqrt")],
        ids=["mean", "sum", "inverse_sqrt"],
    )
    @pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
    def test_of_the_mean_gradient(
        self, loss_fn: Callable[..., Tensor], normalization: str, streamed: bool
    ) -> None:
        """However the loss is normalised, and though the large batch's size changes."""
        model, estimator = Quadratic(), NoiseScaleEstimator()
        accumulator = accumulator_for(
            model, 16, loss_fn, normalization=normalization, noise_scale=estimator
        )
        batches = (
            (uneven(size),) if streamed else batch(size) for _ in range(60) for size in (60, 130)
        )
        check_unbiased(
            single_steps(accumulator, estimator, batches), SIZE, model.gradient_squared()
        )

    def test_ragged_tokens(self) -> None:
        """Samples have one to nine tokens, the short ones first; each token has noise of its own."""
        model, estimator = Quadratic(), NoiseScaleEstimator()
        accumulator = accumulator_for(
            model, 16, normalization=lambda t: (t == 0).sum(), noise_scale=estimator
        )
        lengths = torch.arange(90) // 10 + 1
        targets = torch.where(torch.arange(9) < lengths[:, None], 0, -100)
        batches = ((torch.randn(90, 9, SIZE, dtype=torch.float64), targets) for _ in range(100))
        tokens_per_sample = 5.0
        check_unbiased(
            single_steps(accumulator, estimator, batches),
            SIZE / tokens_per_sample,
            model.gradient_squared(),
        )

    def test_a_first_micro_batch_that_is_ignored(self) -> None:
        model, estimator = Quadratic(), NoiseScaleEstimator()
        accumulator = accumulator_for(
            model, 10, normalization=lambda t: (t == 0).sum(), noise_scale=estimator
        )
        targets = torch.cat([torch.full((10,), -100), torch.zeros(90)])
        batches = ((batch(100)[0], targets) for _ in range(100))
        # Ninety samples count, which the large batch has as a hundred.
        check_unbiased(
            single_steps(accumulator, estimator, batches), SIZE / 0.9, model.gradient_squared()
        )

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
    def test_dtypes_and_backends(self, dtype: torch.dtype, backend: str) -> None:
        model, estimator = Quadratic(dtype), NoiseScaleEstimator()
        accumulator = accumulator_for(model, 25, noise_scale=estimator, backend=backend)
        steps = 3 if backend == "triton" else 120
        batches = (batch(100, dtype) for _ in range(steps))
        rows = single_steps(accumulator, estimator, batches)
        if backend == "triton":
            assert torch.isfinite(rows).all()
        else:
            # bfloat16 rounds the gradient by less than the few percent that this tells apart.
            check_unbiased(rows, SIZE, model.gradient_squared())

    def test_backends_agree(self, backend: str) -> None:
        given = [batch(30, torch.float32) for _ in range(3)]
        scales = []
        for chosen in (backend, "auto"):
            accumulator = accumulator_for(Quadratic(torch.float32), backend=chosen)
            scales += [accumulator.backward(*each).noise_scale for each in given][-1:]
        assert scales[0].value == pytest.approx(scales[1].value, rel=1e-4)
        assert scales[0].interval() == pytest.approx(scales[1].interval(), rel=1e-3)


class TestInterval:
    def test_holds_the_truth_as_often_as_it_says(self) -> None:
        model = Quadratic()
        truth, trials = SIZE / model.gradient_squared(), 80
        inside = {0.5: 0, 0.95: 0}
        for _ in range(trials):
            accumulator = accumulator_for(model, 16)
            for _ in range(8):
                noise_scale = accumulator.backward(*batch(64)).noise_scale
            for confidence in inside:
                low, high = noise_scale.interval(confidence)
                inside[confidence] += low <= truth <= high
        # Three standard deviations of a binomial count.
        assert 0.33 <= inside[0.5] / trials <= 0.67
        assert 0.87 <= inside[0.95] / trials < 1.0

    def test_narrows(self) -> None:
        accumulator = accumulator_for(Quadratic(size=0.3), 16)
        widths = []
        for step in range(1, 65):
            low, high = accumulator.backward(*batch(64)).noise_scale.interval()
            if step in (16, 64):
                widths.append(high - low)
        assert 0.35 < widths[1] / widths[0] < 0.7

    def test_nothing_but_noise(self) -> None:
        accumulator = accumulator_for(Quadratic(size=0.0), 16)
        for _ in range(20):
            noise_scale = accumulator.backward(*batch(64)).noise_scale
        low, high = noise_scale.interval()
        assert high == math.inf
        # Batches of 64 would show a gradient that is not much smaller than their noise.
        assert low > 64

    def test_no_noise(self) -> None:
        accumulator = accumulator_for(Quadratic(), 16)
        for _ in range(3):
            noise_scale = accumulator.backward(*batch(64, noise=0.0)).noise_scale
        assert noise_scale.value == pytest.approx(0.0, abs=1e-9)
        assert noise_scale.interval() == pytest.approx((0.0, 0.0), abs=1e-6)

    def test_after_one_step(self) -> None:
        noise_scale = accumulator_for(Quadratic(), 16).backward(*batch(64)).noise_scale
        assert noise_scale.steps == 1
        assert noise_scale.interval() == (0.0, math.inf)
        assert "1 steps" in str(noise_scale)

    @pytest.mark.parametrize("confidence", [0.0, 1.0, 95.0, math.nan])
    def test_no_such_confidence(self, confidence: float) -> None:
        noise_scale = accumulator_for(Quadratic(), 16).backward(*batch(64)).noise_scale
        with pytest.raises(ValueError, match="between 0 and 1"):
            noise_scale.interval(confidence)

    def test_what_varies_together(self) -> None:
        """A numerator that is always twice the denominator."""
        means = Means(2.0, 1.0, 0.16, 0.04, 0.08, degrees_of_freedom=9.0)
        assert means.ratio_interval(0.95) == pytest.approx((2.0, 2.0), rel=1e-6)

    @pytest.mark.parametrize(
        ("degrees", "expected", "within"),
        [(2, 4.3027, 0.01), (4, 2.7764, 1e-3), (9, 2.2622, 1e-4), (1e6, 1.96, 1e-4)],
    )
    def test_student(self, degrees: float, expected: float, within: float) -> None:
        assert student_quantile(0.975, degrees) == pytest.approx(expected, rel=within)


class TestWhatCounts:
    def test_a_skipped_step_does_not(self) -> None:
        accumulator = accumulator_for(Quadratic())
        before = accumulator.step(*batch(30)).noise_scale
        inputs, targets = batch(30)
        inputs[20] = math.nan
        skipped = accumulator.step(inputs, targets)
        assert skipped.skipped
        assert skipped.noise_scale.steps == 1
        assert skipped.noise_scale.value == before.value
        assert accumulator.step(*batch(30)).noise_scale.steps == 2

    def test_nor_one_whose_loss_alone_is_not_finite(self) -> None:
        inputs, targets = batch(30)
        infinite = torch.tensor(math.inf, dtype=torch.float64)
        accumulator = accumulator_for(Quadratic(), loss_fn=lambda o, t: mean(o, t) + infinite)
        result = accumulator.step(inputs, targets)
        assert result.skipped
        assert torch.isfinite(result.grad_norm)
        assert result.noise_scale.steps == 0

    def test_only_skipped_steps(self) -> None:
        inputs, targets = batch(30)
        noise_scale = accumulator_for(Quadratic()).step(inputs * math.nan, targets).noise_scale
        assert noise_scale.steps == 0
        assert math.isnan(noise_scale.value)
        assert noise_scale.interval() == (0.0, math.inf)

    @pytest.mark.parametrize("as_stream", [False, True])
    def test_a_single_micro_batch_does_not(self, as_stream: bool) -> None:
        accumulator = accumulator_for(Quadratic())
        given = batch(7)
        assert accumulator.step(*((iter([given]),) if as_stream else given)).skipped is False
        result = accumulator.step(*given)
        # Of a stream it is not known beforehand.
        assert result.noise_scale.steps == 0 if as_stream else result.noise_scale is None
        assert accumulator.step(*batch(8)).noise_scale.steps == 1
        assert accumulator.step(*given).noise_scale.steps == 1

    def test_a_step_that_fails_does_not(self) -> None:
        model = Quadratic()
        accumulator = accumulator_for(model)
        accumulator.step(*batch(30))

        def fail(*_: Any) -> None:
            raise KeyError("in the optimizer")

        handle = accumulator._optimizer.register_step_pre_hook(fail)
        with pytest.raises(KeyError):
            accumulator.step(*batch(30))
        handle.remove()
        assert accumulator.step(*batch(30)).noise_scale.steps == 2

    def test_only_where_it_is_asked_for(self) -> None:
        model = Quadratic()
        accumulator = StreamedAccumulator(
            model,
            torch.optim.SGD(model.parameters()),
            mean,
            normalization="mean",
            micro_batch_size=7,
        )
        assert accumulator.step(*batch(30)).noise_scale is None

    @pytest.mark.parametrize(
        "options", [{"noise_scale": False}, {"cross_sample_loss": True, "normalization": "auto"}]
    )
    def test_none(self, options: dict[str, Any]) -> None:
        assert accumulator_for(Quadratic(), **options).step(*batch(30)).noise_scale is None

    def test_none_with_exact_batch_norm(self) -> None:
        model = nn.Sequential(nn.Linear(SIZE, 4), nn.BatchNorm1d(4))
        loss_fn = nn.CrossEntropyLoss()
        given = torch.randn(30, SIZE), torch.randint(4, (30,))
        options = {"normalization": "auto", "loss_fn": loss_fn}
        assert accumulator_for(model, **options).step(*given).noise_scale is None
        with pytest.warns(UserWarning, match="batch norm"):
            accumulator = accumulator_for(model, batch_norm="micro_batch", **options)
        assert accumulator.step(*given).noise_scale is not None

    @pytest.mark.usefixtures("adding")
    def test_scaled_or_clipped_it_is_the_same(self) -> None:
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
        given = [batch(30) for _ in range(6)]
        results = []
        for options in ({}, {"grad_scaler": scaler}, {"max_grad_norm": 1e-3}):
            accumulator = accumulator_for(Quadratic(), **options)
            results.append([accumulator.step(*each) for each in given][-1])
        plain, scaled, clipped = (result.noise_scale for result in results)
        assert scaler.get_scale() > 1024.0
        assert scaled.value == pytest.approx(plain.value, rel=1e-10)
        assert clipped.value == pytest.approx(plain.value, rel=1e-10)
        assert scaled.covariance == pytest.approx(plain.covariance, rel=1e-10)

    @pytest.mark.parametrize("backend", ["auto", "reference"])
    def test_pieces_after_out_of_memory(self, backend: str) -> None:
        """The first micro-batch fails half way back, and comes in pieces: together they are compared."""

        def run(*numbers: int) -> tuple[StepResult, Failing]:
            torch.manual_seed(3)
            model = nn.Sequential(nn.Linear(SIZE, 6), nn.Tanh(), nn.Linear(6, 4)).double()
            accumulator = accumulator_for(
                model, 8, nn.CrossEntropyLoss(), normalization="auto", backend=backend
            )
            given = torch.randn(24, SIZE, dtype=torch.float64), torch.randint(4, (24,))
            with Failing(*numbers) as memory:
                return accumulator.backward(*given), memory

        expected, memory = run()
        failed = 0
        for number in range(memory.allocations // 3):
            try:
                result, memory = run(number)
            except torch.OutOfMemoryError:
                continue
            failed += memory.failed
            assert result.micro_batches > expected.micro_batches
            assert result.noise_scale.value == pytest.approx(expected.noise_scale.value, rel=1e-9)
        assert failed > 5

    def test_dropout_is_noise(self) -> None:
        model = nn.Sequential(nn.Linear(SIZE, 4, bias=False), nn.Dropout(0.5)).double()
        given = torch.ones(64, SIZE, dtype=torch.float64), torch.zeros(64, dtype=torch.int64)
        loss_fn = nn.CrossEntropyLoss()
        result = accumulator_for(model, 16, loss_fn, normalization="auto").backward(*given)
        assert result.noise_scale.covariance > 1e-3
        model.eval()
        result = accumulator_for(model, 16, loss_fn, normalization="auto").backward(*given)
        assert abs(result.noise_scale.covariance) < 1e-9

    def test_anything_else_is_refused(self) -> None:
        with pytest.raises(TypeError, match="NoiseScaleEstimator"):
            accumulator_for(Quadratic(), noise_scale="yes")


def comparison(part: float, whole: float) -> Comparison:
    numbers = torch.tensor([part, whole], dtype=torch.float64)
    return Comparison(numbers[0], numbers[1], 0.25, 100)


class TestSmoothing:
    def test_weighted_means(self) -> None:
        decay, rng = 0.8, np.random.default_rng(0)
        estimator, rows = NoiseScaleEstimator(decay), []
        for part, whole in rng.uniform(1.0, 2.0, (12, 2)):
            estimator.add(comparison(part, whole), torch.tensor(True))
            covariance = 100 * (part - whole / 16) / (0.25 * 0.75)
            rows.append([covariance, whole - covariance / 100])
        weights = decay ** np.arange(12)[::-1]
        figures = np.array(rows)
        means = np.average(figures, axis=0, weights=weights)
        estimate = estimator.estimate
        assert estimate.covariance == pytest.approx(means[0], rel=1e-12)
        assert estimate.gradient_squared == pytest.approx(means[1], rel=1e-12)
        effective = weights.sum() ** 2 / (weights**2).sum()
        assert estimate._effective_steps == pytest.approx(effective, rel=1e-12)

    def test_an_estimate_stays_as_it_was(self) -> None:
        accumulator = accumulator_for(Quadratic())
        first = accumulator.step(*batch(30)).noise_scale
        second = accumulator.step(*batch(30)).noise_scale
        assert (first.steps, second.steps) == (1, 2)
        assert isinstance(pickle.loads(pickle.dumps(second)), NoiseScale)

    def test_follows_what_changes(self) -> None:
        model, estimator = Quadratic(), NoiseScaleEstimator(decay=0.9)
        accumulator = accumulator_for(model, 16, noise_scale=estimator)
        for _ in range(30):
            accumulator.backward(*batch(64, noise=10.0))
        for _ in range(100):
            noise_scale = accumulator.backward(*batch(64)).noise_scale
        assert noise_scale.covariance == pytest.approx(SIZE, rel=0.3)

    @pytest.mark.parametrize("decay", [1.0, -0.1, math.nan])
    def test_no_such_decay(self, decay: float) -> None:
        with pytest.raises(ValueError, match="decay is"):
            NoiseScaleEstimator(decay)

    @pytest.mark.parametrize("steps", [0, 3])
    def test_state(self, steps: int) -> None:
        one, other = NoiseScaleEstimator(0.9), NoiseScaleEstimator(0.5)
        for _ in range(steps):
            one.add(comparison(*np.random.uniform(1.0, 2.0, 2)), torch.tensor(True))
        other.load_state_dict(one.state_dict())
        for estimator in (one, other):
            estimator.add(comparison(1.5, 1.2), torch.tensor(True))
        assert one.estimate.interval() == other.estimate.interval()
        assert one.estimate.steps == other.estimate.steps == steps + 1

    def test_a_part_that_tells_nothing(self) -> None:
        for fraction in (0.0, 1.0, math.nan):
            estimator = NoiseScaleEstimator()
            weight = torch.tensor(fraction, dtype=torch.float64)
            part = comparison(1.0, 1.0)._replace(fraction=weight)
            estimator.add(part, torch.tensor(True))
            assert estimator.estimate.steps == 0
