"""Losses that compare samples: the gradient of the whole large batch, whatever the split."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import tolerances
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.full_batch import assert_close, assert_gradients_match, full_batch, gradients_of
from torch import Tensor, nn
from torch.nn import functional

from sbp_fast import StreamedAccumulator

SAMPLES = 11
EXACT = tolerances.STEP[torch.float64]


class Tower(nn.Module):
    def __init__(self, width: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, 12), norm(12), nn.Tanh(), nn.Linear(12, 12), norm(12), nn.Linear(12, 5)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Pair(NamedTuple):
    left: Tensor
    right: Tensor


class TwoTowers(nn.Module):
    """As in CLIP: two encoders and a learned temperature, returned as ``structure`` says."""

    def __init__(self, structure: str, norm: Callable[[int], nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.left, self.right = Tower(7, norm), Tower(4, norm)
        self.logit_scale = nn.Parameter(torch.tensor(1.3))
        self.structure = structure

    def forward(self, left: Tensor, right: Tensor) -> Any:
        a, b = self.left(left), self.right(right)
        if self.structure == "dict":
            return {"embeddings": [a, b], "scale": self.logit_scale.exp(), "name": "towers"}
        return Pair(a, b)


def info_nce(outputs: Any, targets: Tensor) -> Tensor:
    if isinstance(outputs, dict):
        (a, b), scale = outputs["embeddings"], outputs["scale"]
    else:
        (a, b), scale = outputs, 3.0
    logits = functional.normalize(a, dim=1) @ functional.normalize(b, dim=1).T * scale
    return (
        functional.cross_entropy(logits, targets) + functional.cross_entropy(logits.T, targets)
    ) / 2


class SigLip(nn.Module):
    """A loss with parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(1.0))
        self.bias = nn.Parameter(torch.tensor(-2.0))

    def forward(self, outputs: Pair, targets: Tensor) -> Tensor:
        a, b = (functional.normalize(side, dim=1) for side in outputs)
        logits = a @ b.T * self.temperature.exp() + self.bias
        signs = 2.0 * (targets[:, None] == targets[None]).to(logits.dtype) - 1.0
        return -functional.logsigmoid(signs * logits).sum() / len(a)


def barlow_twins(outputs: Pair, targets: Tensor) -> Tensor:
    a, b = ((side - side.mean(0)) / side.std(0) for side in outputs)
    correlation = a.T @ b / len(a)
    return (correlation - torch.eye(len(correlation), dtype=a.dtype)).square().sum()


def hard_triplets(outputs: Pair, targets: Tensor) -> Tensor:
    distances = torch.cdist(outputs.left, outputs.right)
    same = torch.eye(len(distances), dtype=torch.bool)
    hardest = distances.masked_fill(same, float("inf")).min(1).values
    return functional.relu(distances.diagonal() - hardest + 0.5).mean()


LOSSES: dict[str, Callable[[], tuple[str, Any]]] = {
    "info_nce_dict": lambda: ("dict", info_nce),
    "info_nce_tuple": lambda: ("tuple", info_nce),
    "siglip": lambda: ("tuple", SigLip().double()),
    "barlow_twins": lambda: ("tuple", barlow_twins),
    "hard_triplets": lambda: ("tuple", hard_triplets),
}


def make_batch(samples: int = SAMPLES) -> tuple[tuple[Tensor, Tensor], Tensor]:
    return (torch.randn(samples, 7).double(), torch.randn(samples, 4).double()), torch.arange(
        samples
    )


def accumulator_for(
    model: nn.Module, loss_fn: Any, size: int, **options: Any
) -> StreamedAccumulator:
    parameters = list(model.parameters())
    if isinstance(loss_fn, nn.Module):
        parameters += loss_fn.parameters()
    return StreamedAccumulator(
        model,
        torch.optim.SGD(parameters, lr=0.1),
        loss_fn,
        micro_batch_size=size,
        cross_sample_loss=True,
        **options,
    )


@pytest.fixture(params=["layer_norm", "batch_norm"])
def norm(request: pytest.FixtureRequest) -> Callable[[int], nn.Module]:
    return nn.LayerNorm if request.param == "layer_norm" else nn.BatchNorm1d


class TestEverySplit:
    @pytest.mark.parametrize("loss", LOSSES)
    @pytest.mark.parametrize("size", [1, 4, SAMPLES])
    def test_gradient(self, loss: str, size: int, norm: Callable[[int], nn.Module]) -> None:
        structure, loss_fn = LOSSES[loss]()
        model = TwoTowers(structure, norm).double()
        inputs, targets = make_batch()
        expected = full_batch(model, loss_fn, inputs, targets)
        # The oracle's loss is a copy: so are its parameters' gradients.
        loss_gradients = own_gradients(model, loss_fn, inputs, targets)
        result = accumulator_for(model, loss_fn, size).backward(inputs, targets)
        assert_gradients_match(gradients_of(model), expected.gradients, EXACT)
        if isinstance(loss_fn, nn.Module):
            assert_gradients_match(gradients_of(loss_fn), loss_gradients, EXACT)
        assert_close(result.loss, expected.loss, EXACT)
        assert result.samples == SAMPLES

    def test_per_micro_batch_it_would_be_another_gradient(self) -> None:
        model = TwoTowers("tuple").double()
        inputs, targets = make_batch()
        expected = full_batch(model, info_nce, inputs, targets)
        StreamedAccumulator(
            model,
            torch.optim.SGD(model.parameters(), lr=0.1),
            lambda outputs, targets: info_nce(outputs, torch.arange(len(outputs.left))),
            micro_batch_size=4,
            normalization="mean",
            probe=False,
        ).backward(inputs, targets)
        with pytest.raises(AssertionError):
            assert_gradients_match(gradients_of(model), expected.gradients, 0.1)

    @given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=5))
    @settings(max_examples=15)
    def test_streams_of_any_sizes(self, sizes: list[int]) -> None:
        torch.manual_seed(0)
        samples = sum(sizes) + 1
        model = TwoTowers("dict", nn.BatchNorm1d).double()
        inputs, targets = make_batch(samples)
        expected = full_batch(model, info_nce, inputs, targets)

        def micro_batches() -> Iterator[Any]:
            # One buffer that is filled again for every micro-batch.
            buffer = torch.empty(5, 7).double()
            start = 0
            for size in [*sizes, 1]:
                rows = slice(start, start + size)
                buffer[:size] = inputs[0][rows]
                yield (buffer[:size], inputs[1][rows]), targets[rows]
                start += size
            buffer.fill_(float("nan"))

        accumulator_for(model, info_nce, 5).backward(micro_batches())
        assert_gradients_match(gradients_of(model), expected.gradients, EXACT)

    def test_dropout_is_the_same_in_both_passes_and_for_every_split(
        self, norm: Callable[[int], nn.Module]
    ) -> None:
        model = TwoTowers("tuple", norm).double()
        model.left.layers.insert(3, nn.Dropout(0.3))
        inputs, targets = make_batch()
        found = []
        for size in (SAMPLES, 4, 1):
            torch.manual_seed(3)
            accumulator_for(model, info_nce, size).backward(inputs, targets)
            found.append(gradients_of(model))
        assert_gradients_match(found[1], found[0], EXACT)  # type: ignore[arg-type]
        assert_gradients_match(found[2], found[0], EXACT)  # type: ignore[arg-type]

    def test_rows_of_a_sample(self) -> None:
        """Outputs of shape (samples * tokens, ...) are joined like others."""

        class Tokens(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.linear = nn.Linear(4, 5)

            def forward(self, x: Tensor) -> Tensor:
                return self.linear(x).flatten(0, 1)

        def decorrelate(outputs: Tensor, targets: Tensor) -> Tensor:
            centred = outputs - outputs.mean(0)
            return (centred.T @ centred / len(outputs)).square().sum()

        model = Tokens().double()
        inputs = torch.randn(SAMPLES, 3, 4).double()
        targets = torch.arange(SAMPLES)
        expected = full_batch(model, decorrelate, inputs, targets)
        accumulator_for(model, decorrelate, 4).backward(inputs, targets)
        assert_gradients_match(gradients_of(model), expected.gradients, EXACT)

    def test_inputs_that_are_written_to(self, norm: Callable[[int], nn.Module]) -> None:
        class Centring(Tower):
            def forward(self, x: Tensor) -> Tensor:
                x -= 0.5
                return super().forward(x)

        model = Centring(7, norm).double()
        (inputs, _), targets = make_batch()
        decorrelate = lambda outputs, targets: outputs.cov().square().mean()  # noqa: E731
        expected = full_batch(model, decorrelate, inputs.clone(), targets)
        accumulator_for(model, decorrelate, 4).backward(inputs, targets)
        assert_gradients_match(gradients_of(model), expected.gradients, EXACT)

    def test_a_step_with_everything(self, norm: Callable[[int], nn.Module]) -> None:
        """Clipping, momentum, the scaler and the update, against training on whole batches."""
        model = TwoTowers("dict", norm).double()
        whole = copy.deepcopy(model)
        inputs, targets = make_batch()
        results = {}
        for name, (one, size) in {"split": (model, 4), "whole": (whole, SAMPLES)}.items():
            accumulator = StreamedAccumulator(
                one,
                torch.optim.AdamW(one.parameters(), lr=1e-2),
                info_nce,
                micro_batch_size=size,
                cross_sample_loss=True,
                max_grad_norm=0.1,
                grad_scaler=torch.amp.GradScaler("cpu", init_scale=64.0),
            )
            for _ in range(5):
                results[name] = accumulator.step(inputs, targets)
        assert not results["split"].skipped
        for a, b in zip(model.state_dict().values(), whole.state_dict().values(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


class TestBuffers:
    def test_are_updated_once(self) -> None:
        model = TwoTowers("tuple", nn.BatchNorm1d).double()
        once = copy.deepcopy(model)
        inputs, targets = make_batch()
        for rows in (slice(0, 4), slice(4, 8), slice(8, None)):
            once(*(part[rows] for part in inputs))
        accumulator_for(model, info_nce, 4, batch_norm="micro_batch").backward(inputs, targets)
        for (name, found), expected in zip(model.named_buffers(), once.buffers(), strict=True):
            torch.testing.assert_close(found, expected, msg=name)


class TestBadInput:
    def test_a_model_that_changes_between_the_passes(self) -> None:
        class Counting(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.linear = nn.Linear(7, 5)
                self.calls = 0

            def forward(self, x: Tensor) -> Tensor:
                self.calls += 1
                return self.linear(x) * self.calls

        model = Counting().double()
        before = copy.deepcopy(model.state_dict())
        (inputs, _), targets = make_batch()
        loss_fn = lambda outputs, targets: (outputs @ outputs.T).square().mean()  # noqa: E731
        accumulator = accumulator_for(model, loss_fn, 4, probe=False)
        with pytest.raises(RuntimeError, match=r"micro-batch 0 are not the same.*change between"):
            accumulator.step(inputs, targets)
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
        assert all(parameter.grad is None for parameter in model.parameters())

    def test_outputs_that_do_not_fit_together(self) -> None:
        class PerBatch(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.linear = nn.Linear(7, 5)

            def forward(self, x: Tensor) -> Any:
                return {"features": self.linear(x), "mean": x.mean()}

        model = PerBatch().double()
        (inputs, _), targets = make_batch()
        loss_fn = lambda outputs, targets: outputs["features"].square().sum() ** 2  # noqa: E731
        with pytest.raises(ValueError, match=r"output 1 .* shape \(\).*\(samples, \.\.\.\)"):
            accumulator_for(model, loss_fn, 4).backward(inputs, targets)

    def test_a_model_with_its_own_loss(self) -> None:
        model = nn.Linear(3, 1)
        with pytest.raises(ValueError, match="needs a loss_fn"):
            accumulator_for(model, None, 4)

    def test_a_normalization_beside_it(self) -> None:
        model = nn.Linear(3, 1)
        with pytest.raises(ValueError, match="normalization is 'mean' with cross_sample_loss"):
            accumulator_for(model, info_nce, 4, normalization="mean")

    def test_a_loss_that_is_no_scalar(self) -> None:
        model = nn.Linear(7, 5).double()
        (inputs, _), targets = make_batch()
        with pytest.raises(ValueError, match="must be a scalar"):
            accumulator_for(model, lambda o, t: o @ o.T, 4).backward(inputs, targets)


def own_gradients(model: nn.Module, loss_fn: Any, inputs: Any, targets: Tensor) -> Any:
    if not isinstance(loss_fn, nn.Module):
        return {}
    model, loss_fn = copy.deepcopy(model), copy.deepcopy(loss_fn)
    loss_fn(model(*inputs), targets).backward()
    return gradients_of(loss_fn)
