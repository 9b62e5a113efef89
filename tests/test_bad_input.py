"""Bad input: an error that names the value and the cure, and nothing has changed."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
from collections import UserDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import tolerances
import torch
from reference.full_batch import assert_gradients_match, full_batch, gradients_of, parameters_of
from torch import Tensor, nn
from torch.nn import functional
from unchanged import State

from sbp_fast import StreamedAccumulator
from sbp_fast.ops import BackendUnavailableError

# These models have batch norm on purpose: a failed step must put its statistics back.
pytestmark = pytest.mark.filterwarnings("ignore:.*batch norm layers:UserWarning")

SAMPLES, MICRO = 10, 4
# Which of the three micro-batches goes wrong.
WHERE = pytest.mark.parametrize("where", [0, 1, 2], ids=["first", "middle", "last"])
PREVIOUS = pytest.mark.parametrize("previous", [False, True], ids=["no_grad", "grad_before"])


class Net(nn.Module):
    """With batch norm, whose statistics a failed step must not move, and a buffer that forward
    replaces instead of writing to. ``fails_in``: how many more calls succeed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)
        self.register_buffer("calls", torch.zeros(()))
        self.fails_in: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        x = torch.relu(self.norm(self.first(x)))
        if self.fails_in is not None:
            self.fails_in -= 1
            if self.fails_in < 0:
                raise LookupError("mine")
        return self.last(x)


def vectors(samples: int = SAMPLES) -> tuple[Tensor, Tensor]:
    return torch.randn(samples, 6), torch.randint(4, (samples,))


class Trainer:
    """A model some steps into its training, with an accumulator that has already made a step."""

    def __init__(self, *, previous: bool = True, model: nn.Module | None = None, **options: Any):
        self.model = Net() if model is None else model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.loss_fn = options.pop("loss_fn", None) or nn.CrossEntropyLoss()
        self.accumulator = StreamedAccumulator(
            self.model, self.optimizer, self.loss_fn, micro_batch_size=MICRO, **options
        )
        self.accumulator.step(*vectors())
        if previous:
            self.accumulator.backward(*vectors())
        self.state = State(self.model, self.optimizer)

    def check_unchanged_and_able_to_go_on(self) -> None:
        """The next step is the oracle's (in eval mode, where batch norm does not mix samples)."""
        self.state.check()
        self.model.eval()
        inputs, targets = vectors()
        before = parameters_of(self.model)
        oracle = full_batch(self.model, nn.CrossEntropyLoss(), inputs, targets)
        self.accumulator.backward(inputs, targets)
        assert_gradients_match(
            gradients_of(self.model), oracle.gradients, tolerances.STEP[torch.float32]
        )
        assert not self.accumulator.step(inputs, targets).skipped
        moved = parameters_of(self.model)
        assert not any(torch.equal(moved[name], before[name]) for name in before)


def fail_at(call: int, error: BaseException) -> Callable[[Tensor, Tensor], Tensor]:
    """Cross entropy that raises the ``call``-th time after :func:`arm`; before that it works."""
    calls: list[int] = []

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        if loss_fn.armed:  # type: ignore[attr-defined]
            calls.append(1)
            if len(calls) == call + 1:
                loss_fn.armed = False  # type: ignore[attr-defined]
                raise error
        return functional.cross_entropy(outputs, targets)

    loss_fn.armed = False  # type: ignore[attr-defined]
    return loss_fn


OPTIONS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"micro_batch_size": 0}, ValueError, "micro_batch_size is 0; it must be at least 1"),
    ({"micro_batch_size": -3}, ValueError, "micro_batch_size is -3; it must be at least 1"),
    ({"micro_batch_size": 2.0}, TypeError, "micro_batch_size is 2.0; it must be an int"),
    ({"micro_batch_size": True}, TypeError, "micro_batch_size is True; it must be an int"),
    ({"micro_batch_size": None}, TypeError, "micro_batch_size is None; it must be an int"),
    ({"micro_batch_size": "8"}, TypeError, "micro_batch_size is '8'; it must be an int"),
    ({"memory_budget": "8 GoB"}, ValueError, "8 GoB"),
    (
        {"batch_norm": "frozen"},
        ValueError,
        "batch_norm is 'frozen'; it must be one of 'exact', 'micro_batch'",
    ),
    ({"dropout": 0.5}, ValueError, "dropout is 0.5; it must be one of 'per_sample', 'native'"),
    (
        {"cross_sample_loss": "yes"},
        ValueError,
        "cross_sample_loss is 'yes'; it must be one of False, True",
    ),
    ({"probe": "once"}, ValueError, "probe is 'once'; it must be one of True, False"),
    ({"activations": "drop"}, ValueError, "activations is 'drop'; it must be one of 'auto'"),
    ({"activations": ["keep"]}, ValueError, "activations is ['keep']; it must be one of 'auto'"),
    ({"max_grad_norm": 0}, ValueError, "max_grad_norm is 0; it must be a number greater than 0"),
    ({"max_grad_norm": -1.0}, ValueError, "max_grad_norm is -1.0; it must be a number greater"),
    ({"max_grad_norm": float("nan")}, ValueError, "max_grad_norm is nan; it must be a number"),
    (
        {"max_grad_norm": "1"},
        ValueError,
        "max_grad_norm is '1'; it must be a number greater than 0",
    ),
    ({"max_grad_norm": True}, ValueError, "max_grad_norm is True; it must be a number greater"),
    (
        {"autocast": torch.float32},
        ValueError,
        "autocast is torch.float32; it must be torch.bfloat16",
    ),
    ({"autocast": "bf16"}, TypeError, "autocast is 'bf16'; it must be None, torch.bfloat16"),
    ({"autocast": True}, TypeError, "autocast is True; it must be None, torch.bfloat16"),
    ({"backend": "gpu"}, ValueError, "backend is 'gpu'; it must be one of 'auto', 'cuda'"),
    ({"backend": "cuda"}, ValueError, "backend='cuda' computes on cuda tensors, these are on cpu"),
    (
        {"normalization": "batch"},
        ValueError,
        "normalization is 'batch'; it must be one of auto, mean",
    ),
    (
        {"normalization": "sum"},
        ValueError,
        "normalization='sum' says that the loss does not divide",
    ),
    ({"normalization": None}, ValueError, "normalization is None; it must be one of auto, mean"),
    (
        {"loss_fn": lambda outputs, targets: outputs.sum()},
        ValueError,
        "normalization='auto' cannot see how loss_fn=<lambda> averages. Declare it: 'mean'",
    ),
    ({"loss_fn": "mse"}, TypeError, "loss_fn is 'mse'; it must be "),
    (
        {"loss_fn": "mse", "normalization": "mean"},
        TypeError,
        "loss_fn is 'mse'; it must be ",
    ),
    (
        {"loss_fn": None},
        ValueError,
        "normalization='auto' cannot see how a model that returns its own loss averages",
    ),
    (
        {"loss_fn": nn.CrossEntropyLoss(reduction="none")},
        ValueError,
        "CrossEntropyLoss() has reduction='none', so it returns no scalar; use reduction='mean'",
    ),
    (
        {"loss_fn": nn.MSELoss(reduction="sum"), "normalization": "mean"},
        ValueError,
        "MSELoss() has reduction='sum'; use normalization='sum'",
    ),
    ({"grad_scaler": True}, TypeError, "grad_scaler is True; it must be a torch.amp.GradScaler"),
    ({"model": "resnet"}, TypeError, "model is a str; it must be a torch.nn.Module"),
    (
        {"model": nn.ReLU()},
        ValueError,
        "the model has 0 parameters, none of which requires a gradient",
    ),
    (
        {"model": nn.Linear(2, 2).requires_grad_(False)},
        ValueError,
        "the model has 2 parameters, none of which requires a gradient; set requires_grad_(True)",
    ),
    ({"optimizer": None}, TypeError, "optimizer is a NoneType; it must be a torch.optim.Optimizer"),
    ({"optimizer": "sgd"}, TypeError, "optimizer is a str; it must be a torch.optim.Optimizer"),
]


class TestOptions:
    @pytest.mark.parametrize(
        ("option", "kind", "words"),
        OPTIONS,
        ids=[
            ",".join(f"{k}={type(v).__name__}-{i}" for k, v in o[0].items())
            for i, o in enumerate(OPTIONS)
        ],
    )
    def test_refused(self, option: dict[str, Any], kind: type[Exception], words: str) -> None:
        model = nn.Linear(2, 2)
        arguments = {
            "model": model,
            "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
            "loss_fn": nn.CrossEntropyLoss(),
            "micro_batch_size": 2,
            **option,
        }
        with pytest.raises(kind) as caught:
            StreamedAccumulator(**arguments)
        assert words in str(caught.value)
        assert not has_hooks(model)

    def test_what_each_refusal_recommends_is_accepted(self) -> None:
        model = nn.Linear(2, 2)
        StreamedAccumulator(
            model,
            torch.optim.SGD(model.parameters(), lr=0.1),
            nn.CrossEntropyLoss(),
            micro_batch_size=1,
            memory_budget=None,
            batch_norm="micro_batch",
            dropout="native",
            cross_sample_loss=False,
            activations="keep",
            max_grad_norm=float("inf"),
            autocast=torch.float16,
            backend="reference",
        )

    def test_batch_norm_is_warned_of(self) -> None:
        """Where it is not exact: then the step depends on the micro-batch size."""
        model = Net()
        arguments = (model, torch.optim.SGD(model.parameters(), lr=0.1), nn.CrossEntropyLoss())
        with pytest.warns(UserWarning, match="'norm' first.* the step depends on micro_batch_size"):
            StreamedAccumulator(*arguments, micro_batch_size=MICRO, batch_norm="micro_batch")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            StreamedAccumulator(*arguments, micro_batch_size=MICRO)
        model.eval()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            StreamedAccumulator(*arguments, micro_batch_size=MICRO, batch_norm="micro_batch")

    def test_an_unusable_backend_is_no_other(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from sbp_fast.ops import backends
        from sbp_fast.ops.native import Availability

        backends._resolve.cache_clear()
        monkeypatch.setattr(backends, "availability", lambda _: Availability(False, "it is away"))
        model = nn.Linear(2, 2)
        with pytest.raises(
            BackendUnavailableError, match="backend='cpu' is not usable here: it is"
        ):
            StreamedAccumulator(
                model,
                torch.optim.SGD(model.parameters(), lr=0.1),
                nn.CrossEntropyLoss(),
                micro_batch_size=1,
                backend="cpu",
            )


def two(count: int = SAMPLES) -> Iterator[tuple[Tensor, Tensor]]:
    yield vectors(6)
    yield vectors(count)


@dataclass
class Unsplit:
    values: Tensor


BATCHES: list[tuple[str, Callable[[], tuple[Any, ...]], type[Exception], str]] = [
    (
        "empty",
        lambda: vectors(0),
        ValueError,
        "inputs has 0 samples; a large batch needs at least one",
    ),
    (
        "lengths",
        lambda: (vectors()[0], vectors()[1][:7]),
        ValueError,
        "targets has 7 samples but inputs has 10; the first dimensions of inputs and targets must",
    ),
    (
        "graph",
        lambda: (vectors()[0] * torch.ones(6, requires_grad=True), vectors()[1]),
        ValueError,
        "inputs was computed with gradients, and each micro-batch would go back through its graph; "
        "pass it with .detach()",
    ),
    (
        "dataclass",
        lambda: ({"input": vectors()[0], "more": Unsplit(torch.ones(10))}, vectors()[1]),
        ValueError,
        "inputs['more'] is a Unsplit, a dataclass whose tensors would not be split; pass a dict",
    ),
    (
        "list_of_micro_batches",
        lambda: ([vectors(), vectors()],),
        ValueError,
        "(a list of micro-batches is passed as iter(list))",
    ),
    (
        "leaf_lengths",
        lambda: ({"x": torch.ones(10, 6), "y": [torch.ones(9)]}, torch.ones(10)),
        ValueError,
        "inputs['y'][0] has 9 samples but inputs['x'] has 10",
    ),
    (
        "no_tensor",
        lambda: (3.5, [1]),
        ValueError,
        "the batch holds no tensor with a first dimension",
    ),
    ("no_dimension", lambda: (torch.ones(()), 1.0), ValueError, "inputs must have shape (samples"),
    (
        "nested_mapping",
        lambda: ({"x": UserDict(a=torch.ones(3))}, torch.ones(3)),
        ValueError,
        "inputs['x'] is a UserDict; a batch is made of tensors and NumPy arrays",
    ),
    (
        "no_targets",
        lambda: (vectors()[0],),
        ValueError,
        "targets are None although there is a loss_fn",
    ),
    (
        "listed_targets",
        lambda: (vectors()[0], vectors()[1].tolist()),
        ValueError,
        "counts in one tensor of targets, but they are a list",
    ),
    ("empty_stream", lambda: (iter(()),), ValueError, "the stream of micro-batches is empty"),
    ("empty_item", lambda: (two(0),), ValueError, "inputs has 0 samples"),
    (
        "stream_of_inputs",
        lambda: (iter([vectors()[0]]),),
        ValueError,
        "item 0 of the stream of micro-batches is a Tensor; it must be a pair (inputs, targets)",
    ),
    (
        "stream_of_triples",
        lambda: (iter([vectors(), (1, 2, 3)]),),
        ValueError,
        "item 1 of the stream of micro-batches is a tuple; it must be a pair",
    ),
    (
        "targets_beside_a_stream",
        lambda: (two(), vectors()[1]),
        ValueError,
        "targets were given beside an iterable of micro-batches; let the iterable yield pairs",
    ),
    (
        "all_ignored",
        lambda: (vectors()[0], torch.full((SAMPLES,), -100)),
        ValueError,
        "the targets of the large batch weigh 0.0 in all; at least one must count",
    ),
    (
        "all_ignored_stream",
        lambda: (iter([(vectors()[0], torch.full((SAMPLES,), -100))] * 2),),
        ValueError,
        "the targets of the large batch weigh 0.0 in all; at least one must count",
    ),
    (
        "batch_of_one",
        lambda: vectors(1),
        ValueError,
        "batch norm 'norm' has 1 value per channel in the whole large batch",
    ),
    (
        "wrong_width",
        lambda: (torch.ones(10, 5), vectors()[1]),
        RuntimeError,
        "cannot be multiplied",
    ),
]


class TestBatches:
    @pytest.mark.parametrize(
        ("batch", "kind", "words"),
        [case[1:] for case in BATCHES],
        ids=[case[0] for case in BATCHES],
    )
    @PREVIOUS
    def test_refused(
        self,
        batch: Callable[[], tuple[Any, ...]],
        kind: type[Exception],
        words: str,
        previous: bool,
    ) -> None:
        trainer = Trainer(previous=previous)
        for method in (trainer.accumulator.step, trainer.accumulator.backward):
            with pytest.raises(kind) as caught:
                method(*batch())
            assert words in str(caught.value)
            trainer.state.check()
        trainer.check_unchanged_and_able_to_go_on()

    @pytest.mark.parametrize(
        ("loss", "kind", "words"),
        [
            (
                lambda loss: loss.expand(4),
                ValueError,
                "the loss has shape (4,); it must be a scalar: use reduction='mean' or 'sum'",
            ),
            (
                lambda loss: loss.expand(0),
                ValueError,
                "the loss has shape (0,); it must be a scalar",
            ),
            (lambda loss: float(loss), TypeError, "the loss is a float; it must be a tensor"),
            (lambda loss: None, TypeError, "the loss is a NoneType; it must be a tensor"),
            (lambda loss: loss.detach(), ValueError, "the loss does not depend on any trainable"),
        ],
        ids=["vector", "nothing", "float", "none", "detached"],
    )
    def test_a_loss_that_is_no_scalar(
        self, loss: Callable[[Tensor], Any], kind: type[Exception], words: str
    ) -> None:
        broken = []

        def loss_fn(outputs: Tensor, targets: Tensor) -> Any:
            plain = functional.cross_entropy(outputs, targets)
            return loss(plain) if broken else plain

        trainer = Trainer(loss_fn=loss_fn, normalization="mean")
        broken.append(True)
        with pytest.raises(kind) as caught:
            trainer.accumulator.step(*vectors())
        assert words in str(caught.value)
        broken.clear()
        trainer.check_unchanged_and_able_to_go_on()

    def test_a_model_that_returns_no_loss(self) -> None:
        class Lists(nn.Linear):
            def forward(self, x: Tensor) -> Any:
                return [super().forward(x)]

        model = Lists(6, 4)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        accumulator = StreamedAccumulator(
            model, optimizer, None, micro_batch_size=MICRO, normalization="mean"
        )
        with pytest.raises(TypeError, match=r"the model returned a list that is no loss .*labels"):
            accumulator.step(vectors()[0])

    def test_targets_that_nobody_would_look_at(self) -> None:
        model = nn.Linear(6, 1)
        accumulator = StreamedAccumulator(
            model,
            torch.optim.SGD(model.parameters(), lr=0.1),
            None,
            micro_batch_size=MICRO,
            normalization="mean",
        )
        with pytest.raises(
            ValueError, match="targets are a Tensor although loss_fn is None; put them"
        ):
            accumulator.step(*vectors())

    def test_a_sparse_gradient(self) -> None:
        model = nn.Sequential(nn.Embedding(5, 6, sparse=True), nn.Flatten(), nn.Linear(6, 4))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        accumulator = StreamedAccumulator(
            model, optimizer, nn.CrossEntropyLoss(), micro_batch_size=MICRO
        )
        state = State(model, optimizer)
        with pytest.raises(
            RuntimeError, match=r"parameter '0.weight' .* only dense gradients .* sparse=False"
        ):
            accumulator.step(torch.zeros(10, 1, dtype=torch.int64), vectors()[1])
        state.check()

    def test_everything_frozen_since(self) -> None:
        trainer = Trainer()
        trainer.model.requires_grad_(False)
        with pytest.raises(ValueError, match="none of which requires a gradient"):
            trainer.accumulator.step(*vectors())
        trainer.model.requires_grad_(True)
        trainer.check_unchanged_and_able_to_go_on()


class TestExceptions:
    @WHERE
    @PREVIOUS
    @pytest.mark.parametrize("error", [RuntimeError("mine"), KeyboardInterrupt()], ids=repr)
    def test_in_the_loss(self, where: int, previous: bool, error: BaseException) -> None:
        loss_fn = fail_at(where, error)
        trainer = Trainer(loss_fn=loss_fn, normalization="mean", previous=previous)
        loss_fn.armed = True  # type: ignore[attr-defined]
        with pytest.raises(type(error)):
            trainer.accumulator.step(*vectors())
        trainer.check_unchanged_and_able_to_go_on()

    @WHERE
    def test_in_the_model(self, where: int) -> None:
        trainer = Trainer()
        trainer.model.fails_in = where
        with pytest.raises(LookupError, match="mine"):
            trainer.accumulator.step(*vectors())
        trainer.model.fails_in = None
        trainer.check_unchanged_and_able_to_go_on()

    @WHERE
    def test_in_the_data(self, where: int) -> None:
        def stream() -> Iterator[tuple[Tensor, Tensor]]:
            for _ in range(where):
                yield vectors(MICRO)
            raise OSError("the disk is gone")

        trainer = Trainer()
        with pytest.raises(OSError, match="the disk is gone"):
            trainer.accumulator.step(stream())
        trainer.check_unchanged_and_able_to_go_on()

    @WHERE
    def test_in_backward(self, where: int) -> None:
        class Breaks(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor) -> Tensor:
                return x.clone()

            @staticmethod
            def backward(ctx: Any, gradient: Tensor) -> Tensor:
                broken.append(1)
                if len(broken) == where + 1:
                    raise ArithmeticError("mine")
                return gradient

        broken: list[int] = []
        armed: list[int] = []

        def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
            return functional.cross_entropy(Breaks.apply(outputs) if armed else outputs, targets)

        trainer = Trainer(loss_fn=loss_fn, normalization="mean")
        armed.append(1)
        with pytest.raises(ArithmeticError):
            trainer.accumulator.step(*vectors())
        armed.clear()
        trainer.check_unchanged_and_able_to_go_on()

    def test_in_the_optimizer(self) -> None:
        trainer = Trainer()

        def fail(*_: Any) -> None:
            raise ArithmeticError("mine")

        handle = trainer.optimizer.register_step_pre_hook(fail)
        with pytest.raises(ArithmeticError):
            trainer.accumulator.step(*vectors())
        handle.remove()
        trainer.check_unchanged_and_able_to_go_on()


def infinite_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """An infinite loss with a finite gradient."""
    marked = (targets == 0).any()
    return functional.cross_entropy(outputs, targets) + torch.where(marked, torch.inf, 0.0)


def steep_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """A finite loss with an infinite gradient."""
    marked = (targets == 0).any()
    steep = (outputs.sum() * 0).sqrt() if bool(marked) else 0.0
    return functional.cross_entropy(outputs, targets) + steep


LOSSES = pytest.mark.parametrize("loss_fn", [infinite_loss, steep_loss], ids=["loss", "gradient"])


class TestNonFinite:
    """The step is skipped and says so."""

    def check(self, loss_fn: Any, where: int, *, previous: bool = True, **options: Any) -> None:
        model = Net()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        accumulator = StreamedAccumulator(
            model, optimizer, loss_fn, micro_batch_size=MICRO, normalization="mean", **options
        )
        inputs, targets = torch.randn(SAMPLES, 6), torch.randint(1, 4, (SAMPLES,))
        assert not accumulator.step(inputs, targets).skipped
        if previous:
            accumulator.backward(inputs, targets)
        state = State(model, optimizer)
        broken = targets.clone()
        broken[where * MICRO] = 0  # the losses above break on this class
        result = accumulator.step(inputs, broken)
        assert result.skipped is True
        assert bool(torch.isfinite(result.loss)) == (loss_fn is steep_loss)
        state.check()
        assert not accumulator.step(inputs, targets).skipped
        assert not torch.equal(model.first.weight, state.tensors["first.weight"])

    @LOSSES
    @WHERE
    @PREVIOUS
    def test_skipped(self, loss_fn: Any, where: int, previous: bool) -> None:
        self.check(loss_fn, where, previous=previous)

    @LOSSES
    def test_every_backend_sees_it(self, loss_fn: Any, backend: str) -> None:
        self.check(loss_fn, 1, backend=backend)

    @LOSSES
    @pytest.mark.parametrize("enabled", [True, False], ids=["enabled", "disabled"])
    def test_with_a_grad_scaler(self, loss_fn: Any, enabled: bool) -> None:
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0, enabled=enabled)
        self.check(loss_fn, 1, grad_scaler=scaler)

    @pytest.mark.parametrize("max_grad_norm", [None, 1.0])
    def test_not_a_number_in_the_data(self, max_grad_norm: float | None) -> None:
        trainer = Trainer(max_grad_norm=max_grad_norm)
        inputs, targets = vectors()
        inputs[5, 2] = torch.nan
        assert trainer.accumulator.step(inputs, targets).skipped is True
        trainer.check_unchanged_and_able_to_go_on()

    def test_a_gradient_too_large_for_its_parameter(self) -> None:
        """The float32 sum is finite; in float16, as it would be written to p.grad, it is not."""
        model = nn.Linear(3, 1, bias=False).half()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        accumulator = StreamedAccumulator(
            model,
            optimizer,
            lambda outputs, _: (outputs.float() * 30000.0).sum(),
            micro_batch_size=1,
            normalization="sum",
        )
        state = State(model, optimizer)
        inputs = torch.ones(3, 3, dtype=torch.float16)
        assert accumulator.step(inputs, inputs).skipped is True
        state.check()
        assert not accumulator.step(inputs[:2], inputs[:2]).skipped

    def test_backward_leaves_it(self) -> None:
        """As ``Tensor.backward`` does: who calls it decides."""
        trainer = Trainer()
        inputs, targets = vectors()
        inputs[5, 2] = torch.nan
        result = trainer.accumulator.backward(inputs, targets)
        assert result.skipped is False
        assert bool(result.grad_norm.isnan())
        assert any(bool(p.grad.isnan().any()) for p in trainer.model.parameters())


def has_hooks(model: nn.Module) -> bool:
    return any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())


class TestLivingBesideAnAccumulator:
    def test_hooks_go_with_it(self) -> None:
        trainer = Trainer(backend="reference")
        model = trainer.model
        assert has_hooks(model)
        del trainer
        gc.collect()
        assert not has_hooks(model)

    def test_plain_backward_works(self) -> None:
        trainer = Trainer(previous=False)
        trainer.model.eval()
        for inputs, targets in (vectors(), vectors()):
            trainer.model.zero_grad()
            loss = functional.cross_entropy(trainer.model(inputs), targets)
            loss.backward()
            oracle = full_batch(trainer.model, nn.CrossEntropyLoss(), inputs, targets)
            assert_gradients_match(
                gradients_of(trainer.model), oracle.gradients, tolerances.STEP[torch.float32]
            )

    @pytest.mark.parametrize("how", ["deepcopy", "pickle", "state_dict"])
    def test_the_model_can_be_copied(self, how: str) -> None:
        trainer = Trainer()
        if how == "deepcopy":
            copied = copy.deepcopy(trainer.model)
        elif how == "pickle":
            copied = pickle.loads(pickle.dumps(trainer.model))
        else:
            copied = Net()
            copied.load_state_dict(trainer.model.state_dict())
        assert not has_hooks(copied)
        trainer.state.check()
        trainer.model.eval()
        copied.eval()
        inputs, targets = vectors()
        oracle = full_batch(trainer.model, nn.CrossEntropyLoss(), inputs, targets)
        optimizer = torch.optim.SGD(copied.parameters(), lr=0.1)
        StreamedAccumulator(
            copied, optimizer, nn.CrossEntropyLoss(), micro_batch_size=MICRO
        ).backward(inputs, targets)
        assert_gradients_match(
            gradients_of(copied), oracle.gradients, tolerances.STEP[torch.float32]
        )
