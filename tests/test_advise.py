"""What is said of batch sizes, against the steps that training takes; and ``sbp-fast advise``."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from sbp_fast import StreamedAccumulator
from sbp_fast.cli import main
from sbp_fast.data.fashion_mnist import load_slice
from sbp_fast.tuning import NoiseScale, advise
from sbp_fast.tuning.measure import measure_noise_scale


class TestAdvise:
    def test_steps_and_samples(self) -> None:
        advice = advise(100.0, 50, [50, 100, 400])
        assert [cost.steps for cost in advice.costs] == pytest.approx([3.0, 2.0, 1.25])
        assert [cost.samples for cost in advice.costs] == pytest.approx([1.5, 2.0, 5.0])
        assert [cost.steps_saved for cost in advice.costs] == pytest.approx(
            [0.0, 1 / 3, 1 - 1.25 / 3]
        )
        assert advice.critical_batch_size == 100.0
        # The trade of steps for samples: McCandlish et al. 2018, section 2.
        for cost in advice.costs:
            assert (cost.steps - 1) * (cost.samples - 1) == pytest.approx(1.0)

    def test_as_many_samples_as_steps_times_their_batch(self) -> None:
        advice = advise(37.0, 10)
        products = [cost.steps * cost.batch_size / cost.samples for cost in advice.costs]
        assert products == pytest.approx([products[0]] * len(products))
        assert [cost.batch_size for cost in advice.costs] == [2, 5, 10, 20, 40, 80, 160]

    def test_the_interval_of_the_savings(self) -> None:
        noise_scale = measured([8, 8, 8, 8], [1.0, 0.9, 1.1, 1.05])
        low, high = noise_scale.interval()
        advice = advise(noise_scale, 16, [4, 64])
        for cost in advice.costs:
            bounds = [advise(n, 16, [cost.batch_size]).costs[0].steps_saved for n in (low, high)]
            assert cost.steps_saved_interval == pytest.approx(sorted(bounds))
            assert cost.steps_saved_interval[0] < cost.steps_saved < cost.steps_saved_interval[1]

    def test_nothing_but_noise(self) -> None:
        """Twice the batch, half the steps."""
        advice = advise(math.inf, 64, [32, 128])
        assert [cost.steps_saved for cost in advice.costs] == [-1.0, 0.5]
        assert "unbounded" in str(advice)

    def test_no_noise(self) -> None:
        (cost,) = advise(0.0, 64, [128]).costs
        assert (cost.steps, cost.samples, cost.steps_saved) == (1.0, math.inf, 0.0)

    @pytest.mark.parametrize(
        ("noise_scale", "current", "sizes", "named"),
        [
            (math.nan, 1, None, "noise scale is nan"),
            (-1.0, 1, None, "noise scale is -1.0"),
            (1.0, 0, None, "batch size is 0"),
            (1.0, 8, [4, -2], "batch size is -2"),
        ],
    )
    def test_refused(
        self, noise_scale: float, current: int, sizes: Sequence[int] | None, named: str
    ) -> None:
        with pytest.raises(ValueError, match=named):
            advise(noise_scale, current, sizes)


def measured(covariances: Sequence[float], gradients: Sequence[float]) -> NoiseScale:
    """From these figures of single steps, whose weights are all but equal."""
    x, y = (torch.tensor(row, dtype=torch.float64) for row in (covariances, gradients))
    decay = 1 - 1e-6
    means = torch.stack([x.mean(), y.mean(), (x * x).mean(), (y * y).mean(), (x * y).mean()])
    return NoiseScale(means * (1 - decay ** len(x)), torch.tensor([float(len(x))]), decay)


class LinearRegression(nn.Module):
    """Inputs are normal, targets without noise: the gradient's noise shrinks with the gradient.

    Of one sample it is ``x x^T e`` with the error ``e`` of the weights, so that ``tr(Sigma) = (d + 1)
    |e|^2`` and ``|G|^2 = |e|^2``: the noise scale is ``d + 1`` everywhere.
    """

    DIMENSIONS = 64

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.ones(self.DIMENSIONS, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weights


def steps_of_regression(batch_size: int, runs: int = 40) -> float:
    """To a hundredth of the error's square, at the best of several rates; the mean of many runs."""
    rates = torch.logspace(-2.0, 0.0, 25, dtype=torch.float64)[:, None, None]
    error = torch.ones(len(rates), runs, LinearRegression.DIMENSIONS, dtype=torch.float64)
    start = LinearRegression.DIMENSIONS
    taken = torch.full((len(rates), runs), math.inf, dtype=torch.float64)
    for step in range(1, 400):
        x = torch.randn(runs, batch_size, error.shape[2], dtype=torch.float64)
        residuals = torch.einsum("nbd,rnd->rnb", x, error)
        error = error - rates / batch_size * torch.einsum("nbd,rnb->rnd", x, residuals)
        there = error.square().sum(2) < start / 100
        taken = taken.minimum(torch.where(there, float(step), math.inf))
        if bool((taken.mean(1).isfinite()).any()):
            break
    return float(taken.mean(1).min())


# 1 + n / B takes steps for small; when a step removes a fifth of the error that is off by a tenth, and
# the number of steps is a whole one.
OF_REGRESSION = 0.15
# Four runs with a learning rate out of two or three, a noise scale that grows during the run.
OF_IMAGES = 0.3


class TestStepsToTarget:
    def test_linear_regression(self) -> None:
        model = LinearRegression()
        accumulator = StreamedAccumulator(
            model,
            torch.optim.SGD(model.parameters()),
            nn.MSELoss(),
            micro_batch_size=16,
            noise_scale=True,
        )
        for _ in range(80):
            x = torch.randn(256, model.DIMENSIONS, dtype=torch.float64)
            noise_scale = accumulator.backward(x, torch.zeros(256, dtype=torch.float64)).noise_scale
        low, high = noise_scale.interval()
        assert low < model.DIMENSIONS + 1 < high
        assert high / low < 1.6
        advice = advise(noise_scale, 2, [2, 4, 8, 16])
        taken = [steps_of_regression(cost.batch_size) for cost in advice.costs]
        for cost, steps in zip(advice.costs, taken, strict=True):
            assert 1 - steps / taken[0] == pytest.approx(cost.steps_saved, abs=OF_REGRESSION)
            expected = cost.steps / advice.costs[0].steps
            assert steps / taken[0] == pytest.approx(expected, rel=OF_REGRESSION)

    def test_images(self) -> None:
        """Fashion-MNIST to a loss of 0.65: three batch sizes, from the noise scale of a fourth."""
        rates = {8: (0.05, 0.08, 0.12), 32: (0.15, 0.22), 512: (0.45, 0.6)}
        taken = {size: min(train(size, rate)[0] for rate in rates[size]) for size in rates}
        taken[128], noise_scale = train(128, 0.3)
        advice = advise(noise_scale, 128, list(taken))
        assert 20 < advice.critical_batch_size < 100
        for cost in advice.costs:
            measured_ratio = taken[cost.batch_size] / taken[128]
            expected = cost.steps / (1 + noise_scale.value / 128)
            assert measured_ratio == pytest.approx(expected, rel=OF_IMAGES), taken


def train(batch_size: int, lr: float) -> tuple[int, NoiseScale]:
    """Steps to the target, and the noise scale on the way."""
    images, labels = small_images()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(196, 32), nn.ReLU(), nn.Linear(32, 10))
    accumulator = StreamedAccumulator(
        model,
        torch.optim.SGD(model.parameters(), lr=lr),
        nn.CrossEntropyLoss(),
        micro_batch_size=max(4, batch_size // 8),
        probe=False,
        noise_scale=True,
    )
    for step in range(1, 1000):
        chosen = torch.randint(len(images), (batch_size,))
        noise_scale = accumulator.step(images[chosen], labels[chosen]).noise_scale
        with torch.no_grad():
            if functional.cross_entropy(model(images[:3000]), labels[:3000]) < 0.65:
                return step, noise_scale
    raise AssertionError(f"the target is not reached with batches of {batch_size} at {lr}")


def small_images() -> tuple[Tensor, Tensor]:
    """14 x 14 pixels, shape (9000, 196), with mean 0 and variance 1."""
    data = load_slice()
    images = functional.avg_pool2d(data.train_images[:, None].float(), 2).flatten(1)
    return (images - images.mean()) / images.std(), data.train_labels


class TestMeasure:
    def test_the_model_stays_as_it_is(self) -> None:
        model = LinearRegression()
        x = torch.randn(400, model.DIMENSIONS, dtype=torch.float64)
        noise_scale = measure_noise_scale(
            model, nn.MSELoss(), x, torch.zeros(400, dtype=torch.float64), batch_size=60
        )
        assert noise_scale.steps == 6
        assert torch.equal(model.weights, torch.ones_like(model.weights))
        assert model.weights.grad is None

    def test_each_sample_once(self) -> None:
        """NumPy arrays, in a dict; a model that returns its own loss."""
        seen: list[Tensor] = []

        class Own(LinearRegression):
            def forward(self, number: Tensor) -> Tensor:  # type: ignore[override]
                seen.append(number)
                return (self.weights.sum() * number).mean()

        numbers = torch.arange(40, dtype=torch.float64).numpy()
        options = {"loss_fn": None, "normalization": "mean", "probe": False, "batch_size": 10}
        measure_noise_scale(Own(), inputs={"number": numbers}, **options)
        assert sorted(torch.cat(seen).tolist()) == list(range(40))

    def test_an_optimizer_trains(self) -> None:
        model = LinearRegression()
        x = torch.randn(400, model.DIMENSIONS, dtype=torch.float64)
        targets = torch.zeros(400, dtype=torch.float64)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        options = {"batch_size": 40, "optimizer": optimizer}
        measure_noise_scale(model, nn.MSELoss(), x, targets, **options)
        assert float(model.weights.detach().norm()) < 0.8 * LinearRegression.DIMENSIONS**0.5

    @pytest.mark.parametrize(("batch_size", "micro"), [(30, None), (8, 8), (1, None)])
    def test_too_few(self, batch_size: int, micro: int | None) -> None:
        x = torch.randn(50, LinearRegression.DIMENSIONS, dtype=torch.float64)
        with pytest.raises(ValueError, match="two batches at least"):
            measure_noise_scale(
                LinearRegression(),
                nn.MSELoss(),
                x,
                torch.zeros(50, dtype=torch.float64),
                batch_size=batch_size,
                micro_batch_size=micro,
            )


MODULE = """
import torch
from torch import nn

def regression():
    return nn.Linear(20, 1, bias=False), nn.MSELoss(), torch.randn(800, 20), torch.randn(800, 1)

def with_batch_norm():
    model = nn.Sequential(nn.Linear(20, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    return {**dict(zip(("model", "loss_fn", "inputs", "targets"), regression())), "model": model,
            "batch_size": 80}

def raising():
    raise KeyError("who knows")
"""


@pytest.fixture
def subject(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    before = set(sys.modules)
    (tmp_path / "subject.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    yield "subject"
    for name in set(sys.modules) - before:
        if name == "subject":
            del sys.modules[name]


class TestCommand:
    def test_a_table(self, subject: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["advise", f"{subject}:regression", "--batch-sizes", "10,40,640"]) == 0
        first, second, _, header, _, *rows = capsys.readouterr().out.splitlines()
        assert first.startswith("noise scale")
        assert "20 steps" in first
        assert second.startswith("critical batch size: ")
        assert "steps saved" in header
        assert [row.split()[0] for row in rows] == ["10", "40", "640"]
        assert "40 (now)" in rows[1]

    def test_sizes_are_passed_on(self, subject: str, capsys: pytest.CaptureFixture[str]) -> None:
        options = ["--batch-size", "100", "--micro-batch-size", "99", "--seed", "3"]
        assert main(["advise", f"{subject}:regression", *options]) == 0
        out = capsys.readouterr().out
        assert "8 steps" in out
        assert "100 (now)" in out

    def test_exact_batch_norm(self, subject: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["advise", f"{subject}:with_batch_norm"]) == 2
        assert "batch_norm='micro_batch'" in capsys.readouterr().err
        with pytest.warns(UserWarning, match="batch norm"):
            status = main(["advise", f"{subject}:with_batch_norm", "--batch-norm", "micro_batch"])
        assert status == 0
        assert "80 (now)" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("name", "options", "said"),
        [
            ("absent", [], "absent"),
            ("regression", ["--batch-size", "500"], "two batches at least"),
            ("raising", [], "ended in KeyError"),
        ],
    )
    def test_bad_input(
        self,
        subject: str,
        name: str,
        options: list[str],
        said: str,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        assert main(["advise", f"{subject}:{name}", *options]) == 2
        assert said in capsys.readouterr().err
