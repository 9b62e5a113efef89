"""Who divides by what: every loss that is read, against the whole batch at once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tolerances
import torch
from reference.full_batch import (
    assert_close,
    assert_gradients_match,
    full_batch,
    gradients_of,
)
from torch import Tensor, nn
from torch.nn import functional

from sbp_fast import StepResult, StreamedAccumulator
from sbp_fast.batches import MicroBatch
from sbp_fast.loss import LossContract, Shares, read_contract

SAMPLES, CLASSES, POSITIONS = 11, 4, 3
WEIGHTS = torch.tensor([0.1, 1.0, 5.0, 20.0], dtype=torch.float64)
BOUND = tolerances.STEP[torch.float64]
streamed = pytest.mark.parametrize("stream", [False, True], ids=["announced", "streamed"])
splits = pytest.mark.parametrize("micro_batch_size", [1, 4, SAMPLES])


class Positions(nn.Module):
    """Outputs of shape (samples, classes, positions), as segmentation or language models give."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, CLASSES * POSITIONS)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).unflatten(1, (CLASSES, POSITIONS))


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def linear(*after: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(6, CLASSES), *after)


def labels() -> Tensor:
    return torch.randint(CLASSES, (SAMPLES,))


def some_ignored(index: int) -> Callable[[], Tensor]:
    def targets() -> Tensor:
        # Ragged: the first pieces lose most, one piece of four loses all.
        ignored = torch.rand(SAMPLES, POSITIONS) < torch.linspace(0.9, 0.0, SAMPLES)[:, None]
        ignored[4:8] = True
        ignored[-1] = False
        return torch.randint(CLASSES, (SAMPLES, POSITIONS)).masked_fill(ignored, index)

    return targets


def values() -> Tensor:
    return randn(SAMPLES, CLASSES)


def probabilities() -> Tensor:
    return values().softmax(1)


def position_probabilities() -> Tensor:
    return randn(SAMPLES, CLASSES, POSITIONS).softmax(1)


def signs() -> Tensor:
    return (values() > 0).double() * 2 - 1


def bits() -> Tensor:
    return (values() > 0).double()


def label_lists() -> Tensor:
    lists = torch.full((SAMPLES, CLASSES), -1)
    lists[:, 0] = labels()
    return lists


LOG_SOFTMAX, SIGMOID = nn.LogSoftmax(1), nn.Sigmoid()

# name: model, targets, loss
KNOWN: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], Callable[..., Any]]] = {
    "cross_entropy": (linear, labels, nn.CrossEntropyLoss()),
    "cross_entropy_sum": (linear, labels, nn.CrossEntropyLoss(reduction="sum")),
    "cross_entropy_positions": (Positions, some_ignored(-100), nn.CrossEntropyLoss()),
    "ignore_outside": (Positions, some_ignored(255), nn.CrossEntropyLoss(ignore_index=255)),
    "ignore_a_class": (Positions, some_ignored(2), nn.CrossEntropyLoss(ignore_index=2)),
    "weights": (linear, labels, nn.CrossEntropyLoss(WEIGHTS)),
    "weights_and_ignore": (
        Positions,
        some_ignored(255),
        nn.CrossEntropyLoss(WEIGHTS, ignore_index=255),
    ),
    "weights_ignore_smoothing": (
        Positions,
        some_ignored(-100),
        nn.CrossEntropyLoss(WEIGHTS, label_smoothing=0.2),
    ),
    "smoothing": (Positions, some_ignored(-100), nn.CrossEntropyLoss(label_smoothing=0.2)),
    "probabilities": (linear, probabilities, nn.CrossEntropyLoss()),
    "probabilities_weights_smoothing": (
        linear,
        probabilities,
        nn.CrossEntropyLoss(WEIGHTS, label_smoothing=0.2),
    ),
    "position_probabilities": (Positions, position_probabilities, nn.CrossEntropyLoss()),
    "nll": (lambda: linear(LOG_SOFTMAX), labels, nn.NLLLoss()),
    "nll_weights_ignore": (
        lambda: nn.Sequential(Positions(), LOG_SOFTMAX),
        some_ignored(-1),
        nn.NLLLoss(WEIGHTS, ignore_index=-1),
    ),
    "mse": (linear, values, nn.MSELoss()),
    "mse_sum": (linear, values, nn.MSELoss(reduction="sum")),
    "l1": (linear, values, nn.L1Loss()),
    "smooth_l1": (linear, values, nn.SmoothL1Loss(beta=0.3)),
    "huber": (linear, values, nn.HuberLoss(delta=0.3)),
    "bce": (lambda: linear(SIGMOID), bits, nn.BCELoss()),
    "bce_logits": (linear, bits, nn.BCEWithLogitsLoss(WEIGHTS, pos_weight=WEIGHTS + 1)),
    "kl_mean": (lambda: linear(LOG_SOFTMAX), probabilities, nn.KLDivLoss(reduction="mean")),
    "kl_batchmean": (
        lambda: linear(LOG_SOFTMAX),
        probabilities,
        nn.KLDivLoss(reduction="batchmean"),
    ),
    "kl_sum": (lambda: linear(LOG_SOFTMAX), probabilities, nn.KLDivLoss(reduction="sum")),
    "soft_margin": (linear, signs, nn.SoftMarginLoss()),
    "hinge_embedding": (linear, signs, nn.HingeEmbeddingLoss()),
    "poisson": (linear, probabilities, nn.PoissonNLLLoss()),
    "multi_margin": (linear, labels, nn.MultiMarginLoss(weight=WEIGHTS)),
    "multi_label_margin": (linear, label_lists, nn.MultiLabelMarginLoss()),
    "multi_label_soft_margin": (linear, bits, nn.MultiLabelSoftMarginLoss(WEIGHTS)),
    "f_cross_entropy": (Positions, some_ignored(-100), functional.cross_entropy),
    "f_cross_entropy_partial": (
        Positions,
        some_ignored(255),
        functools.partial(
            functional.cross_entropy, weight=WEIGHTS, ignore_index=255, label_smoothing=0.1
        ),
    ),
    "f_cross_entropy_sum": (
        linear,
        labels,
        functools.partial(functional.cross_entropy, reduction="sum"),
    ),
    "f_nll": (lambda: linear(LOG_SOFTMAX), labels, functional.nll_loss),
    "f_mse": (linear, values, functional.mse_loss),
    "f_l1": (linear, values, functional.l1_loss),
    "f_smooth_l1": (linear, values, functools.partial(functional.smooth_l1_loss, beta=0.3)),
    "f_huber": (linear, values, functional.huber_loss),
    "f_bce": (lambda: linear(SIGMOID), bits, functional.binary_cross_entropy),
    "f_bce_logits": (linear, bits, functional.binary_cross_entropy_with_logits),
    "f_kl_batchmean": (
        lambda: linear(LOG_SOFTMAX),
        probabilities,
        functools.partial(functional.kl_div, reduction="batchmean"),
    ),
}


def run(
    model: nn.Module,
    loss_fn: Any,
    inputs: Tensor,
    targets: Any,
    micro_batch_size: int,
    *,
    stream: bool = False,
    **options: Any,
) -> StepResult:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    accumulator = StreamedAccumulator(
        model, optimizer, loss_fn, micro_batch_size=micro_batch_size, **options
    )
    if not stream:
        return accumulator.backward(inputs, targets)

    def items() -> Iterator[tuple[Tensor, Tensor]]:
        for rows in torch.arange(len(inputs)).split(4):
            yield inputs[rows], targets[rows]

    return accumulator.backward(items())


def check(
    model: nn.Module,
    loss_fn: Any,
    inputs: Tensor,
    targets: Any,
    micro_batch_size: int,
    *,
    factor: float = 1.0,
    oracle_loss: Any = None,
    **options: Any,
) -> None:
    oracle = full_batch(model, oracle_loss or loss_fn, inputs, targets, factor)
    result = run(model, loss_fn, inputs, targets, micro_batch_size, **options)
    assert_gradients_match(gradients_of(model), oracle.gradients, BOUND)
    assert_close(result.loss, oracle.loss, BOUND)
    assert_close(result.grad_norm, oracle.norm, BOUND)


class TestKnownLosses:
    @pytest.mark.parametrize("name", KNOWN)
    @splits
    @streamed
    def test_read_by_itself(self, name: str, micro_batch_size: int, stream: bool) -> None:
        make_model, make_targets, loss_fn = KNOWN[name]
        model = make_model().double()
        check(model, loss_fn, randn(SAMPLES, 6), make_targets(), micro_batch_size, stream=stream)

    @pytest.mark.parametrize(
        "name", ["weights_and_ignore", "mse", "cross_entropy_sum", "kl_batchmean"]
    )
    @streamed
    def test_inverse_sqrt(self, name: str, stream: bool) -> None:
        """The paper's Loss / sqrt(B): the loss as it is, over the root of the samples."""
        make_model, make_targets, loss_fn = KNOWN[name]
        model = make_model().double()
        check(
            model,
            loss_fn,
            randn(SAMPLES, 6),
            make_targets(),
            4,
            stream=stream,
            normalization="inverse_sqrt",
            factor=SAMPLES**-0.5,
        )

    def test_a_contract_that_contradicts_the_loss(self) -> None:
        for loss_fn, normalization, words in [
            (nn.MSELoss(reduction="sum"), "mean", "reduction='sum'; use normalization='sum'"),
            (
                nn.CrossEntropyLoss(reduction="sum"),
                "tokens",
                "reduction='sum'; use normalization='sum'",
            ),
            (nn.MSELoss(), "sum", "reduction='mean'; use normalization='auto', or reduction='sum'"),
            (nn.MSELoss(reduction="none"), "auto", "reduction='none', so it returns no scalar"),
            (functools.partial(functional.mse_loss, reduction="none"), "auto", "returns no scalar"),
        ]:
            with pytest.raises(ValueError) as caught:  # noqa: PT011  (the words are asserted below)
                read_contract(loss_fn, normalization)
            assert words in str(caught.value)

    def test_what_computes_anything_must_be_declared(self) -> None:
        class Focal(nn.CrossEntropyLoss):
            pass

        positional = functools.partial(functional.cross_entropy, randn(1, 2))
        for loss_fn in (Focal(), lambda outputs, targets: outputs.sum(), None, positional):
            with pytest.raises(
                ValueError, match=r"cannot see how .* averages. Declare it: 'mean' if"
            ):
                read_contract(loss_fn, "auto")

    @pytest.mark.parametrize("keyword", ["size_average", "reduce"])
    @pytest.mark.filterwarnings("ignore:size_average and reduce args will be deprecated")
    def test_keywords_of_old(self, keyword: str) -> None:
        """They override the reduction: read them or refuse them, but do not overlook them."""
        loss_fn = functools.partial(functional.mse_loss, **{keyword: False})
        try:
            contract = read_contract(loss_fn, "auto")
        except ValueError:
            return
        assert keyword == "size_average"
        assert contract.weigh is None

    def test_class_weights_are_read_when_they_are_needed(self) -> None:
        loss_fn, model = nn.CrossEntropyLoss(WEIGHTS.clone()), linear().double()
        inputs, targets = randn(SAMPLES, 6), labels()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        accumulator = StreamedAccumulator(model, optimizer, loss_fn, micro_batch_size=4)
        accumulator.backward(inputs, targets)
        assert loss_fn.weight is not None
        for change in ("in_place", "replaced"):
            if change == "in_place":
                loss_fn.weight.copy_(WEIGHTS.flip(0))
            else:
                loss_fn.weight = WEIGHTS * torch.tensor([1.0, 9.0, 1.0, 3.0])
            oracle = full_batch(model, loss_fn, inputs, targets)
            accumulator.backward(inputs, targets)
            assert_gradients_match(gradients_of(model), oracle.gradients, BOUND)


def anonymous(loss_fn: Callable[..., Any]) -> Callable[..., Any]:
    """The same loss, in a form that cannot be read."""
    return lambda outputs, targets: loss_fn(outputs, targets)


class TestDeclaredLosses:
    @splits
    @streamed
    @pytest.mark.parametrize(
        ("name", "normalization"),
        [
            ("cross_entropy", "mean"),
            ("mse", "mean"),
            ("cross_entropy_positions", "tokens"),
            ("cross_entropy_sum", "sum"),
            ("smoothing", "tokens"),
        ],
    )
    def test_by_name(
        self, name: str, normalization: str, micro_batch_size: int, stream: bool
    ) -> None:
        make_model, make_targets, loss_fn = KNOWN[name]
        model, inputs, targets = make_model().double(), randn(SAMPLES, 6), make_targets()
        check(
            model,
            anonymous(loss_fn),
            inputs,
            targets,
            micro_batch_size,
            stream=stream,
            normalization=normalization,
        )

    @splits
    @streamed
    @pytest.mark.parametrize("kind", [float, torch.tensor], ids=["number", "tensor"])
    def test_by_a_callable(self, micro_batch_size: int, stream: bool, kind: Any) -> None:
        """A mean weighted by sample, of which the targets tell the weights."""

        def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
            weights, values = targets[:, :1], targets[:, 1:]
            return (weights * (outputs - values) ** 2).sum() / weights.sum()

        def weight(targets: Tensor) -> Any:
            total = targets[:, 0].sum()
            return float(total) if kind is float else total

        targets = torch.cat([randn(SAMPLES, 1).abs(), values()], dim=1)
        check(
            linear().double(),
            loss_fn,
            randn(SAMPLES, 6),
            targets,
            micro_batch_size,
            stream=stream,
            normalization=weight,
        )

    def test_a_callable_of_the_inputs_where_there_are_no_targets(self) -> None:
        class OwnLoss(nn.Linear):
            def forward(self, x: Tensor) -> Any:
                return {"loss": super().forward(x).square().sum() / x[:, 0].abs().sum()}

        model, inputs = OwnLoss(6, 4).double(), randn(SAMPLES, 6)
        check(model, None, inputs, None, 4, normalization=lambda x: x[:, 0].abs().sum())

    @pytest.mark.parametrize("weight", [-1.0, float("nan"), torch.tensor(-1.0)], ids=repr)
    def test_a_callable_that_returns_no_weight(self, weight: Any) -> None:
        with pytest.raises(ValueError, match="a weight must be a number of at least 0"):
            run(
                linear().double(),
                functional.cross_entropy,
                randn(SAMPLES, 6),
                labels(),
                4,
                normalization=lambda _: weight,
            )

    def test_a_callable_that_returns_no_number(self) -> None:
        with pytest.raises(
            ValueError, match=r"a tensor of shape \(4,\); it must return one number"
        ):
            run(
                linear().double(),
                nn.MSELoss(),
                randn(SAMPLES, 6),
                values(),
                4,
                normalization=lambda targets: targets[:, 0],
            )

    def test_tokens_count_the_labels_of_a_mapping(self) -> None:
        model, inputs, targets = Positions().double(), randn(SAMPLES, 6), some_ignored(-100)()
        check(
            model,
            lambda outputs, targets: functional.cross_entropy(outputs, targets["labels"]),
            inputs,
            {"labels": targets, "other": values()},
            4,
            normalization="tokens",
        )

    def test_labels_that_the_model_shifts(self) -> None:
        """As the README says: the denominator is of the labels that remain."""

        class Causal(Positions):
            def forward(self, x: Tensor, labels: Tensor) -> Tensor:
                logits = super().forward(x)
                return functional.cross_entropy(logits[:, :, :-1], labels[:, 1:])

        model = Causal().double()
        batch = {"x": randn(SAMPLES, 6), "labels": some_ignored(-100)()}
        oracle = full_batch(model, None, batch)
        accumulator = StreamedAccumulator(
            model,
            torch.optim.SGD(model.parameters(), lr=0.1),
            None,
            micro_batch_size=3,
            normalization=lambda batch: (batch["labels"][:, 1:] != -100).sum(),
        )
        accumulator.backward(batch)
        assert_gradients_match(gradients_of(model), oracle.gradients, BOUND)

    def test_dividing_by_the_number_of_micro_batches_would_be_wrong(self) -> None:
        """The classic bug, and that these tests would see it."""
        make_model, make_targets, loss_fn = KNOWN["cross_entropy_positions"]
        model, inputs, targets = make_model().double(), randn(SAMPLES, 6), make_targets()
        oracle = full_batch(model, loss_fn, inputs, targets)
        run(model, anonymous(loss_fn), inputs, targets, 6, normalization=lambda _: 1.0, probe=False)
        with pytest.raises(AssertionError, match="error"):
            assert_gradients_match(gradients_of(model), oracle.gradients, 0.05)


class TestTargets:
    @streamed
    @pytest.mark.parametrize(
        "weight", [None, torch.rand(256, dtype=torch.float64)], ids=["", "weighted"]
    )
    def test_bytes_are_classes(self, weight: Tensor | None, stream: bool) -> None:
        """As a byte, -100 is class 156."""
        model = nn.Linear(6, 256).double()
        targets = torch.randint(150, 160, (SAMPLES,), dtype=torch.uint8)
        check(model, nn.CrossEntropyLoss(weight), randn(SAMPLES, 6), targets, 4, stream=stream)

    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    def test_that_would_be_broadcast_are_refused(self, reduction: str) -> None:
        model = nn.Linear(6, 1).double()
        with pytest.raises(
            ValueError, match=r"shape \(4, 1\) and targets of shape \(4,\) would be broadcast"
        ):
            run(model, nn.MSELoss(reduction=reduction), randn(SAMPLES, 6), randn(SAMPLES), 4)
        assert model.weight.grad is None

    def test_outputs_that_are_no_tensor_are_refused_by_torch(self) -> None:
        class Listed(nn.Linear):
            def forward(self, x: Tensor) -> Any:
                return [super().forward(x)]

        with pytest.raises(AttributeError, match="size"):
            run(Listed(6, 1).double(), nn.MSELoss(), randn(SAMPLES, 6), randn(SAMPLES, 1), 4)

    def test_broadcast_within_a_sample(self) -> None:
        model, loss_fn = linear().double(), nn.L1Loss()
        with pytest.warns(UserWarning, match="target size"):
            check(model, loss_fn, randn(SAMPLES, 6), randn(SAMPLES, 1), 4)

    def test_probabilities_without_classes_are_refused_by_torch(self) -> None:
        with pytest.raises(RuntimeError, match="expected"):
            run(linear().double(), nn.CrossEntropyLoss(), randn(SAMPLES, 6), randn(SAMPLES), 4)


class TestNothingCounts:
    def test_a_first_piece_without_weight_that_stays_on_the_device(self) -> None:
        """There its weight is a tensor, and not read."""
        weights = iter([0.0, 3.0, 1.0])
        contract = LossContract(weigh=lambda _: torch.tensor(next(weights), dtype=torch.float64))
        shares = Shares(contract)
        given = [shares.take(MicroBatch(None, None, 2)) for _ in range(3)]
        assert [float(share * shares.remaining_scale()) for share in given] == [0.0, 0.75, 0.25]

    @streamed
    @pytest.mark.parametrize("position", [0, 1, 2], ids=["first", "middle", "last"])
    def test_an_ignored_micro_batch(self, stream: bool, position: int) -> None:
        targets = labels()
        targets[4 * position : 4 * position + 4] = -100
        check(
            linear().double(), nn.CrossEntropyLoss(), randn(SAMPLES, 6), targets, 4, stream=stream
        )

    @streamed
    def test_an_ignored_large_batch(self, stream: bool) -> None:
        model = linear().double()
        targets = torch.full((SAMPLES,), -100)
        with pytest.raises(
            ValueError,
            match=r"targets of the large batch weigh 0.0 in all; at least one must count",
        ):
            run(model, nn.CrossEntropyLoss(), randn(SAMPLES, 6), targets, 4, stream=stream)
        assert all(parameter.grad is None for parameter in model.parameters())
