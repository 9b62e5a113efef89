"""StreamedAccumulator against the float64 oracle: any split gives the large batch's gradient."""

from __future__ import annotations

import gc
import weakref
from collections import namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tolerances
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.full_batch import (
    FullBatch,
    assert_close,
    assert_gradients_match,
    full_batch,
    full_batch_trajectory,
    gradients_of,
    parameters_of,
    total_norm,
)
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from sbp_fast import StepResult, StreamedAccumulator

SAMPLES = 12
SPLITS = pytest.mark.parametrize("micro_batch_size", [1, 5, SAMPLES])
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False),
            nn.GroupNorm(2, 8),
            nn.ReLU(),
            nn.Conv2d(8, 6, 3, stride=2),
            nn.ReLU(),
        )
        self.head = nn.Linear(6, 4)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images).mean((2, 3)))


class Transformer(nn.Module):
    """Ragged tokens under a mask; the embedding and the output layer share their weight."""

    def __init__(self, vocabulary: int = 11, width: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor, padding: Tensor) -> Tensor:
        x = self.embedding(tokens)
        x = x + self.attention(x, x, x, key_padding_mask=padding, need_weights=False)[0]
        return self.head(self.norm(x)).transpose(1, 2)


class Experts(nn.Module):
    """Some parameters serve some samples only, one serves none."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(6, 4)
        self.expert = nn.Linear(6, 4)
        self.idle = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.shared(x)
        chosen = x[:, 0] > 0.5
        if bool(chosen.any()):
            y = y.index_add(0, chosen.nonzero().squeeze(1), self.expert(x[chosen]))
        return y


class Checkpointed(nn.Module):
    """One layer twice, recomputed in backward: its gradient comes in two parts when reentrant."""

    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.use_reentrant = use_reentrant
        self.first, self.layer, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for _ in range(2):
            x = checkpoint(lambda x: torch.tanh(self.layer(x)), x, use_reentrant=self.use_reentrant)
        return self.last(x)


class SharedUpstream(nn.Module):
    """Autograd hands one gradient tensor, or views of it, to several parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.flat = nn.Parameter(torch.randn(6))
        self.square = nn.Parameter(torch.randn(2, 3))
        self.twin = nn.Parameter(torch.randn(6))
        self.left, self.right = nn.Parameter(torch.randn(2)), nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return x * (
            self.flat + self.square.view(-1) + self.twin + torch.cat([self.left, self.right])
        )


class OwnLoss(nn.Module):
    """Returns its own loss, in one of three wrappings."""

    def __init__(self, wrapping: str) -> None:
        super().__init__()
        self.wrapping, self.layer = wrapping, nn.Linear(6, 4)

    def forward(self, x: Tensor, labels: Tensor) -> Any:
        loss = functional.cross_entropy(self.layer(x), labels)
        if self.wrapping == "tensor":
            return loss
        if self.wrapping == "key":
            return {"loss": loss, "extra": x}
        return SimpleNamespace(loss=loss)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 4))


def frozen() -> nn.Module:
    model = mlp()
    model[0].requires_grad_(False)
    return model


def vectors(samples: int = SAMPLES) -> tuple[Tensor, Tensor]:
    return torch.randn(samples, 6), torch.randint(4, (samples,))


def images() -> tuple[Tensor, Tensor]:
    return torch.randn(SAMPLES, 3, 8, 8), torch.randint(4, (SAMPLES,))


def channels_last_images() -> tuple[Tensor, Tensor]:
    pictures, labels = images()
    return pictures.to(memory_format=torch.channels_last), labels


def ragged_tokens() -> tuple[dict[str, Tensor], Tensor]:
    tokens = torch.randint(11, (SAMPLES, 7))
    lengths = torch.randint(1, 8, (SAMPLES,))
    padding = torch.arange(7) >= lengths[:, None]
    return {"tokens": tokens, "padding": padding}, tokens.roll(-1, 1).masked_fill(padding, -100)


def points() -> tuple[Tensor, Tensor]:
    return torch.randn(SAMPLES, 6), torch.randn(SAMPLES, 6)


@dataclass(frozen=True)
class Case:
    model: Callable[[], nn.Module]
    batch: Callable[[], tuple[Any, Any]]
    loss_fn: nn.Module


CASES = {
    "mlp": Case(mlp, vectors, nn.CrossEntropyLoss()),
    "conv_net": Case(ConvNet, images, nn.CrossEntropyLoss()),
    "channels_last": Case(
        lambda: ConvNet().to(memory_format=torch.channels_last),
        channels_last_images,
        nn.CrossEntropyLoss(),
    ),
    "transformer": Case(Transformer, ragged_tokens, nn.CrossEntropyLoss()),
    "experts": Case(Experts, vectors, nn.CrossEntropyLoss()),
    "frozen_layer": Case(frozen, vectors, nn.CrossEntropyLoss()),
    "checkpoint": Case(lambda: Checkpointed(False), vectors, nn.CrossEntropyLoss()),
    "checkpoint_reentrant": Case(lambda: Checkpointed(True), vectors, nn.CrossEntropyLoss()),
    "shared_upstream": Case(SharedUpstream, points, nn.MSELoss()),
}
EVERY_CASE = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def cast(tree: Any, dtype: torch.dtype) -> Any:
    if isinstance(tree, dict):
        return {name: cast(leaf, dtype) for name, leaf in tree.items()}
    return tree.to(dtype) if tree.is_floating_point() else tree


def sgd(model: nn.Module, lr: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr)


def accumulator_for(
    model: nn.Module, loss_fn: Any = None, micro_batch_size: int = 5, **options: Any
) -> StreamedAccumulator:
    options.setdefault("optimizer", sgd(model))
    optimizer = options.pop("optimizer")
    loss_fn = nn.CrossEntropyLoss() if loss_fn is None else loss_fn
    return StreamedAccumulator(
        model, optimizer, loss_fn, micro_batch_size=micro_batch_size, **options
    )


def check_gradients(
    accumulator: StreamedAccumulator, model: nn.Module, oracle: FullBatch, inputs: Any, targets: Any
) -> StepResult:
    """``backward`` leaves the oracle's gradient, and reports its loss and norm."""
    dtype = next(model.parameters()).dtype
    result = accumulator.backward(inputs, targets)
    assert_gradients_match(gradients_of(model), oracle.gradients, tolerances.STEP[dtype])
    assert_close(result.loss, oracle.loss, tolerances.STEP[dtype])
    assert_close(result.grad_norm, oracle.norm, tolerances.STEP[dtype])
    assert not result.skipped
    return result


class TestEverySplit:
    @EVERY_CASE
    @SPLITS
    @DTYPES
    @pytest.mark.usefixtures("adding")
    def test_gradient(self, case: Case, micro_batch_size: int, dtype: torch.dtype) -> None:
        model = case.model().to(dtype)
        inputs, targets = (cast(tree, dtype) for tree in case.batch())
        oracle = full_batch(model, case.loss_fn, inputs, targets)
        accumulator = accumulator_for(model, case.loss_fn, micro_batch_size)
        check_gradients(accumulator, model, oracle, inputs, targets)
        # Again, with what the first time left in p.grad: it is replaced, not added to.
        check_gradients(accumulator, model, oracle, inputs, targets)

    @EVERY_CASE
    def test_backends(self, case: Case, backend: str) -> None:
        model = case.model()
        inputs, targets = case.batch()
        oracle = full_batch(model, case.loss_fn, inputs, targets)
        accumulator = accumulator_for(model, case.loss_fn, backend=backend)
        check_gradients(accumulator, model, oracle, inputs, targets)

    @settings(max_examples=40)
    @given(
        samples=st.integers(1, 24),
        micro_batch_size=st.integers(1, 30),
        weights=st.lists(st.floats(0.01, 100.0), min_size=4, max_size=4),
        ignored=st.sets(st.integers(1, 23)),
        seed=st.integers(0, 2**16),
    )
    def test_sizes_and_weights(
        self,
        samples: int,
        micro_batch_size: int,
        weights: list[float],
        ignored: set[int],
        seed: int,
    ) -> None:
        torch.manual_seed(seed)
        model = mlp().double()
        inputs, targets = torch.randn(samples, 6, dtype=torch.float64), torch.randint(4, (samples,))
        for index in ignored:  # never the first, so that something counts
            targets[index : index + 1] = -100
        loss_fn = nn.CrossEntropyLoss(weight=torch.tensor(weights, dtype=torch.float64))
        oracle = full_batch(model, loss_fn, inputs, targets)
        result = check_gradients(
            accumulator_for(model, loss_fn, micro_batch_size), model, oracle, inputs, targets
        )
        assert result.samples == samples
        assert result.micro_batches == -(-samples // micro_batch_size)


class TestSteps:
    @pytest.mark.parametrize("name", ["sgd", "adamw"])
    @DTYPES
    @pytest.mark.parametrize("max_grad_norm", [None, 0.5])
    @pytest.mark.usefixtures("adding")
    def test_twenty_steps(self, name: str, dtype: torch.dtype, max_grad_norm: float | None) -> None:
        def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
            groups = [
                {"params": model.features.parameters(), "lr": 0.02},
                {"params": model.head.parameters(), "weight_decay": 0.1},
            ]
            if name == "sgd":
                return torch.optim.SGD(groups, lr=0.05, momentum=0.9)
            return torch.optim.AdamW(groups, lr=0.005)

        model = ConvNet().to(dtype)
        batches = [tuple(cast(tree, dtype) for tree in images()) for _ in range(20)]
        oracle = full_batch_trajectory(
            model, make_optimizer, nn.CrossEntropyLoss(), batches, max_grad_norm
        )
        accumulator = accumulator_for(
            model, optimizer=make_optimizer(model), max_grad_norm=max_grad_norm
        )
        losses = [accumulator.step(inputs, targets).loss for inputs, targets in batches]
        bound = tolerances.TRAJECTORY[dtype]
        assert [float(loss) for loss in losses] == pytest.approx(oracle.losses, rel=bound)
        for parameter, value in parameters_of(model).items():
            expected = oracle.parameters[parameter]
            assert float((value.double() - expected).norm()) <= bound * float(expected.norm())

    def test_a_step_leaves_no_gradient(self) -> None:
        model = mlp()
        accumulator_for(model).step(*vectors())
        assert all(parameter.grad is None for parameter in model.parameters())

    def test_result(self) -> None:
        model, (inputs, targets) = mlp(), vectors()
        oracle = full_batch(model, nn.CrossEntropyLoss(), inputs, targets)
        result = accumulator_for(model).step(inputs, targets)
        assert_close(result.loss, oracle.loss, tolerances.STEP[torch.float32])
        assert_close(result.grad_norm, oracle.norm, tolerances.STEP[torch.float32])
        for value in (result.loss, result.grad_norm):
            assert isinstance(value, Tensor)
            assert value.shape == ()
            assert not value.requires_grad
        assert (result.samples, result.micro_batches, result.micro_batch_size) == (12, 3, 5)
        assert result.peak_bytes is None
        assert result.noise_scale is None
        assert result.skipped is False

    def test_gradients_keep_the_dtype_and_the_strides_of_their_parameters(self) -> None:
        model = ConvNet().to(torch.bfloat16, memory_format=torch.channels_last)
        inputs, targets = channels_last_images()
        accumulator_for(model).backward(inputs.bfloat16(), targets)
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            assert parameter.grad.dtype == torch.bfloat16
            assert parameter.grad.stride() == parameter.stride(), name


class TestClipping:
    @pytest.mark.parametrize("max_grad_norm", [1e-3, 1e3], ids=["clipped", "within"])
    @pytest.mark.parametrize("streamed", [False, True], ids=["announced", "streamed"])
    def test_as_torch_clips(self, max_grad_norm: float, streamed: bool, backend: str) -> None:
        model, (inputs, targets) = mlp(), vectors()
        oracle = full_batch(model, nn.CrossEntropyLoss(), inputs, targets)
        factor = min(1.0, max_grad_norm / (oracle.norm + 1e-6))
        clipped = {name: g * factor for name, g in oracle.gradients.items() if g is not None}
        accumulator = accumulator_for(model, max_grad_norm=max_grad_norm, backend=backend)
        if streamed:
            result = accumulator.backward(
                iter([(inputs[:7], targets[:7]), (inputs[7:], targets[7:])])
            )
        else:
            result = accumulator.backward(inputs, targets)
        assert_gradients_match(gradients_of(model), clipped, tolerances.STEP[torch.float32])
        assert_close(result.grad_norm, oracle.norm, tolerances.STEP[torch.float32])
        # And what torch itself makes of the unclipped gradient.
        accumulator_for(model, backend=backend).backward(inputs, targets)
        norm = nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        assert_close(result.grad_norm, norm, tolerances.STEP[torch.float32])
        assert_gradients_match(gradients_of(model), clipped, tolerances.STEP[torch.float32])


class TestParameters:
    def test_unfrozen_later(self) -> None:
        model, (inputs, targets) = frozen(), vectors()
        accumulator = accumulator_for(model)
        before = parameters_of(model)
        accumulator.step(inputs, targets)
        assert torch.equal(model[0].weight, before["0.weight"])
        model[0].requires_grad_(True)
        oracle = full_batch(model, nn.CrossEntropyLoss(), inputs, targets)
        assert oracle.gradients["0.weight"] is not None
        check_gradients(accumulator, model, oracle, inputs, targets)

    def test_frozen_later(self) -> None:
        model, (inputs, targets) = mlp(), vectors()
        accumulator = accumulator_for(model)
        accumulator.step(inputs, targets)
        model[0].requires_grad_(False)
        oracle = full_batch(model, nn.CrossEntropyLoss(), inputs, targets)
        check_gradients(accumulator, model, oracle, inputs, targets)

    def test_bfloat16_sums_in_float32(self) -> None:
        """256 equal gradients in bfloat16: a bfloat16 sum would stop growing at 256 ulps."""
        model = nn.Linear(4, 1, bias=False).bfloat16()
        inputs = torch.full((256, 4), 1.0078125, dtype=torch.bfloat16)
        accumulator = accumulator_for(
            model, lambda outputs, _: outputs.float().sum(), 1, normalization="sum"
        )
        accumulator.backward(inputs, inputs)
        assert model.weight.grad is not None
        assert torch.equal(model.weight.grad, torch.full((1, 4), 258.0, dtype=torch.bfloat16))

    @EVERY_CASE
    def test_bfloat16(self, case: Case) -> None:
        model = case.model().bfloat16()
        inputs, targets = (cast(tree, torch.bfloat16) for tree in case.batch())
        oracle = full_batch(model, case.loss_fn, inputs, targets)
        check_gradients(accumulator_for(model, case.loss_fn), model, oracle, inputs, targets)

    def test_a_gradient_kept_by_a_hook_stays_what_it_was(self) -> None:
        model, (inputs, targets) = mlp(), vectors()
        kept: list[Tensor] = []
        model[0].weight.register_hook(kept.append)
        copies: list[Tensor] = []
        model[0].weight.register_hook(lambda gradient: copies.append(gradient.clone()))
        oracle = full_batch(model, nn.CrossEntropyLoss(), inputs, targets)
        check_gradients(accumulator_for(model), model, oracle, inputs, targets)
        assert len(kept) == 3
        assert all(map(torch.equal, kept, copies))

    def test_a_hook_may_change_a_gradient(self) -> None:
        model, (inputs, targets) = mlp(), vectors()
        model[0].weight.register_hook(lambda gradient: gradient * 2)
        oracle = full_batch(mlp_like(model), nn.CrossEntropyLoss(), inputs, targets)
        oracle.gradients["0.weight"] *= 2  # type: ignore[operator]
        accumulator_for(model).backward(inputs, targets)
        assert_gradients_match(
            gradients_of(model), oracle.gradients, tolerances.STEP[torch.float32]
        )


def mlp_like(model: nn.Module) -> nn.Module:
    copied = mlp()
    copied.load_state_dict(model.state_dict())
    return copied


class TestContexts:
    def test_no_grad(self) -> None:
        model, (inputs, targets) = mlp(), vectors()
        oracle = full_batch(model, nn.CrossEntropyLoss(), inputs, targets)
        with torch.no_grad():
            check_gradients(accumulator_for(model), model, oracle, inputs, targets)

    @pytest.mark.parametrize("how", ["dtype", "object", "ambient"])
    def test_autocast(self, how: str) -> None:
        model, (inputs, targets) = mlp(), vectors()
        oracle = full_batch(model, nn.CrossEntropyLoss(), inputs, targets)
        seen: list[torch.dtype] = []
        handle = model[0].register_forward_hook(lambda _, __, output: seen.append(output.dtype))
        context = torch.autocast("cpu", dtype=torch.bfloat16)
        option = {"dtype": torch.bfloat16, "object": context, "ambient": None}[how]
        accumulator = accumulator_for(model, autocast=option, probe=False)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "ambient"):
            accumulator.backward(inputs, targets)
        handle.remove()
        assert seen == [torch.bfloat16] * 3
        gradients = gradients_of(model)
        assert {g.dtype for g in gradients.values() if g is not None} == {torch.float32}
        assert_gradients_match(gradients, oracle.gradients, tolerances.STEP[torch.bfloat16])

    def test_steps_in_one_ambient_autocast(self) -> None:
        """Autocast keeps 16-bit copies of the weights until its context ends: they must not outlive
        the step that changed the weights."""
        model, (inputs, targets) = mlp(), vectors()
        accumulator = accumulator_for(model, optimizer=sgd(model, lr=1.0))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for _ in range(3):
                oracle = full_batch(model, nn.CrossEntropyLoss(), inputs, targets)
                loss = accumulator.step(inputs, targets).loss
        assert_close(loss, oracle.loss, tolerances.STEP[torch.bfloat16])

    def test_an_ambient_autocast_stays_out_of_backward(self) -> None:
        """A model that keeps itself in float32 has its gradients in float32, too."""

        class Careful(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                with torch.autocast("cpu", enabled=False):
                    return super().forward(x)

        model, (inputs, targets) = Careful(6, 4), vectors()
        oracle = full_batch(model, nn.CrossEntropyLoss(), inputs, targets)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            check_gradients(accumulator_for(model), model, oracle, inputs, targets)

    def test_a_loss_of_changing_dtype(self) -> None:
        """What scales the gradients of a 16-bit loss must not scale those of the next one."""
        model = nn.Linear(6, 4).bfloat16()
        inputs, targets = torch.randn(SAMPLES, 6).bfloat16(), torch.randint(4, (SAMPLES,))
        calls: list[int] = []

        def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
            calls.append(1)
            loss = functional.cross_entropy(outputs, targets)
            return loss if len(calls) % 2 else loss.float()

        oracle = full_batch(model, nn.CrossEntropyLoss(), inputs, targets)
        accumulator = accumulator_for(model, loss_fn, normalization="mean", probe=False)
        check_gradients(accumulator, model, oracle, inputs, targets)

    def test_a_16_bit_loss_of_a_float32_model(self) -> None:
        """Its share must scale the gradients as they are added, which autograd cannot: from the first
        such loss on, all gradients go through the kernels."""
        model, (inputs, targets) = mlp(), vectors()
        calls: list[int] = []

        def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
            calls.append(1)
            loss = functional.cross_entropy(outputs, targets)
            return loss.bfloat16() if len(calls) % 3 == 2 else loss

        oracle = full_batch(model, nn.CrossEntropyLoss(), inputs, targets)
        accumulator = accumulator_for(model, loss_fn, normalization="mean", probe=False)
        for _ in range(2):
            result = accumulator.backward(inputs, targets)
            assert_gradients_match(
                gradients_of(model), oracle.gradients, tolerances.STEP[torch.float32]
            )
            # The loss itself was rounded by loss_fn.
            assert_close(result.loss, oracle.loss, tolerances.RELATIVE[torch.bfloat16])

    def test_the_loss_is_summed_wider_than_its_dtype(self) -> None:
        model = nn.Linear(6, 4).bfloat16()
        inputs, targets = torch.randn(SAMPLES, 6).bfloat16(), torch.randint(4, (SAMPLES,))
        loss_fn = nn.CrossEntropyLoss()
        expected = sum(
            float(loss_fn(model(x), y)) * len(y) / SAMPLES
            for x, y in zip(inputs.split(5), targets.split(5), strict=True)
        )
        result = accumulator_for(model).backward(inputs, targets)
        assert_close(result.loss, expected, tolerances.RELATIVE[torch.float64])

    def test_a_gradient_wider_than_its_parameter(self) -> None:
        model, (inputs, targets) = mlp().bfloat16(), vectors()
        for parameter in model.parameters():
            parameter.grad_dtype = torch.float32
        oracle = full_batch(model, nn.CrossEntropyLoss(), inputs.bfloat16(), targets)
        accumulator_for(model).backward(inputs.bfloat16(), targets)
        gradients = gradients_of(model)
        assert {g.dtype for g in gradients.values() if g is not None} == {torch.float32}
        assert_gradients_match(gradients, oracle.gradients, tolerances.STEP[torch.bfloat16])

    def test_a_compiled_model(self) -> None:
        model, (inputs, targets) = mlp(), vectors()
        oracle = full_batch(model, nn.CrossEntropyLoss(), inputs, targets)
        compiled = torch.compile(model, backend="aot_eager")
        accumulator_for(compiled, optimizer=sgd(model)).backward(inputs, targets)
        assert_gradients_match(
            gradients_of(model), oracle.gradients, tolerances.STEP[torch.float32]
        )

    def test_two_accumulators_on_one_model(self) -> None:
        model, (inputs, targets) = mlp(), vectors()
        oracle = full_batch(model, nn.CrossEntropyLoss(), inputs, targets)
        both = accumulator_for(model, micro_batch_size=2), accumulator_for(model)
        for accumulator in (*both, *both):
            check_gradients(accumulator, model, oracle, inputs, targets)


class TestGradScaler:
    def test_step(self) -> None:
        model, (inputs, targets) = mlp(), vectors()
        oracle = full_batch_trajectory(model, sgd, nn.CrossEntropyLoss(), [(inputs, targets)] * 3)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=2)
        accumulator = accumulator_for(model, grad_scaler=scaler)
        norm = full_batch(model, nn.CrossEntropyLoss(), inputs, targets).norm
        results = [accumulator.step(inputs, targets) for _ in range(3)]
        for name, value in parameters_of(model).items():
            torch.testing.assert_close(
                value.double(), oracle.parameters[name], rtol=1e-5, atol=1e-7
            )
        assert_close(results[0].grad_norm, norm, tolerances.STEP[torch.float32])
        assert [float(r.loss) for r in results] == pytest.approx(
            oracle.losses, rel=tolerances.STEP[torch.float32]
        )
        assert scaler.get_scale() == 2.0**13  # grew once in three steps

    @pytest.mark.parametrize("max_grad_norm", [1e-3, 1e3], ids=["clipped", "within"])
    def test_clipping_sees_the_unscaled_gradient(self, max_grad_norm: float) -> None:
        model, (inputs, targets) = mlp(), vectors()
        oracle = full_batch_trajectory(
            model, sgd, nn.CrossEntropyLoss(), [(inputs, targets)], max_grad_norm
        )
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
        accumulator_for(model, grad_scaler=scaler, max_grad_norm=max_grad_norm).step(
            inputs, targets
        )
        for name, value in parameters_of(model).items():
            expected = oracle.parameters[name]
            error = float((value.double() - expected).norm())
            assert error <= tolerances.STEP[torch.float32] * float(expected.norm())

    def test_backward_leaves_the_gradient_scaled(self) -> None:
        model, (inputs, targets) = mlp(), vectors()
        oracle = full_batch(model, nn.CrossEntropyLoss(), inputs, targets)
        optimizer, scaler = sgd(model), torch.amp.GradScaler("cpu", init_scale=2.0**12)
        accumulator_for(model, optimizer=optimizer, grad_scaler=scaler).backward(inputs, targets)
        assert_close(
            total_norm(gradients_of(model)), oracle.norm * 2**12, tolerances.STEP[torch.float32]
        )
        scaler.unscale_(optimizer)
        assert_gradients_match(
            gradients_of(model), oracle.gradients, tolerances.STEP[torch.float32]
        )

    def test_an_infinite_loss_is_no_success(self) -> None:
        """Its gradient is finite: the scaler must neither lower nor raise its scale."""
        model, (inputs, targets) = mlp(), vectors()
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1)
        accumulator = accumulator_for(
            model,
            lambda outputs, targets: functional.cross_entropy(outputs, targets) + torch.inf,
            grad_scaler=scaler,
            normalization="mean",
        )
        assert accumulator.step(inputs, targets).skipped
        assert scaler.get_scale() == 8.0

    def test_an_exception_in_the_optimizer_leaves_the_scaler_as_it_was(self) -> None:
        """A scaler that believed the gradients unscaled would let the next step go without."""
        model, (inputs, targets) = mlp(), vectors()
        oracle = full_batch_trajectory(model, sgd, nn.CrossEntropyLoss(), [(inputs, targets)])
        optimizer, scaler = sgd(model), torch.amp.GradScaler("cpu", init_scale=2.0**12)
        accumulator = accumulator_for(model, optimizer=optimizer, grad_scaler=scaler)

        def fail(*_: Any) -> None:
            raise KeyboardInterrupt

        handle = optimizer.register_step_pre_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            accumulator.step(inputs, targets)
        handle.remove()
        accumulator.step(inputs, targets)
        assert scaler.get_scale() == 2.0**12
        for name, value in parameters_of(model).items():
            expected = oracle.parameters[name]
            error = float((value.double() - expected).norm())
            assert error <= tolerances.STEP[torch.float32] * float(expected.norm())

    def test_an_overflow_skips_and_lowers_the_scale(self) -> None:
        model, (inputs, targets) = mlp(), vectors()
        loss_fn = nn.CrossEntropyLoss(reduction="sum")
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-100)
        oracle = full_batch(model, loss_fn, inputs, targets)
        accumulator = accumulator_for(model, loss_fn, grad_scaler=scaler)
        before = parameters_of(model)
        result = accumulator.step(inputs, targets)
        assert result.skipped
        assert scaler.get_scale() == 2.0**27
        assert all(map(torch.equal, parameters_of(model).values(), before.values()))
        assert not accumulator.step(inputs, targets).skipped
        moved = {name: (before[name] - value) / 0.1 for name, value in parameters_of(model).items()}
        # A difference of parameters has their rounding errors.
        assert_gradients_match(moved, oracle.gradients, tolerances.MOVED)


Pair = namedtuple("Pair", ["left", "right"])


class TakesNested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, pair: Pair, scale: float, offset: Tensor) -> Tensor:
        return self.layer(pair.left[0] + pair.right["x"]) * scale + offset


class TestInputs:
    def test_nested_pytrees(self) -> None:
        model = TakesNested()
        inputs = {
            "pair": Pair([torch.randn(SAMPLES, 6)], {"x": torch.randn(SAMPLES, 6)}),
            "scale": 0.5,  # no tensor: every micro-batch gets it
            "offset": torch.tensor(1.5),  # no samples in a tensor of no dimensions
        }
        targets = ({"y": torch.randint(4, (SAMPLES,))}, None)

        def loss_fn(outputs: Tensor, targets: Any) -> Tensor:
            assert targets[1] is None
            return functional.cross_entropy(outputs, targets[0]["y"])

        oracle = full_batch(model, loss_fn, inputs, targets)
        accumulator = accumulator_for(model, loss_fn, normalization="mean")
        check_gradients(accumulator, model, oracle, inputs, targets)

    def test_a_plain_tuple_is_the_arguments(self) -> None:
        model = nn.Bilinear(3, 2, 4)
        inputs, targets = (torch.randn(7, 3), torch.randn(7, 2)), torch.randint(4, (7,))
        oracle = full_batch(model, nn.CrossEntropyLoss(), inputs, targets)
        check_gradients(accumulator_for(model), model, oracle, inputs, targets)

    @pytest.mark.parametrize("kind", ["array", "read_only", "memmap"])
    def test_numpy(self, kind: str, tmp_path: Any) -> None:
        model, (inputs, targets) = mlp(), vectors()
        oracle = full_batch(model, nn.CrossEntropyLoss(), inputs, targets)
        x, y = inputs.numpy(), targets.numpy()
        if kind == "read_only":
            x.flags.writeable = False
        if kind == "memmap":
            np.save(tmp_path / "x.npy", x)
            x = np.load(tmp_path / "x.npy", mmap_mode="r")
            assert isinstance(x, np.memmap)
        check_gradients(accumulator_for(model), model, oracle, x, y)

    @pytest.mark.parametrize("sizes", [(12,), (7, 1, 4), (1,) * 12, (3, 9)], ids=str)
    @pytest.mark.parametrize("micro_batch_size", [2, 5, 50])
    @DTYPES
    def test_generator(
        self, sizes: tuple[int, ...], micro_batch_size: int, dtype: torch.dtype
    ) -> None:
        model = mlp().to(dtype)
        inputs, targets = (cast(tree, dtype) for tree in vectors())
        # Class weights: what the large batch divides by is known only when the stream has ended.
        loss_fn = nn.CrossEntropyLoss(weight=torch.tensor([0.1, 1.0, 5.0, 20.0], dtype=dtype))
        oracle = full_batch(model, loss_fn, inputs, targets)

        def stream() -> Iterator[tuple[Tensor, Tensor]]:
            yield from zip(inputs.split(sizes), targets.split(sizes), strict=True)

        result = check_gradients(
            accumulator_for(model, loss_fn, micro_batch_size), model, oracle, stream(), None
        )
        assert result.samples == SAMPLES
        assert result.micro_batches == sum(-(-size // micro_batch_size) for size in sizes)
        assert result.micro_batch_size == min(micro_batch_size, max(sizes))

    def test_a_generator_may_fill_one_buffer_again(self) -> None:
        model, (inputs, targets) = mlp(), vectors()
        oracle = full_batch(model, nn.CrossEntropyLoss(), inputs, targets)

        def stream() -> Iterator[tuple[Tensor, Tensor]]:
            x, y = torch.empty(3, 6), torch.empty(3, dtype=torch.int64)
            for start in range(0, SAMPLES, 3):
                x.copy_(inputs[start : start + 3])
                y.copy_(targets[start : start + 3])
                yield x, y

        check_gradients(accumulator_for(model), model, oracle, stream(), None)

    @pytest.mark.parametrize("batch_size", [2, 8])
    def test_data_loader(self, batch_size: int) -> None:
        model, (inputs, targets) = mlp(), vectors()
        oracle = full_batch(model, nn.CrossEntropyLoss(), inputs, targets)
        loader = DataLoader(TensorDataset(inputs, targets), batch_size=batch_size)
        accumulator = accumulator_for(model)
        for _ in range(2):  # unlike a generator, it can be read again
            check_gradients(accumulator, model, oracle, loader, None)

    @pytest.mark.parametrize("wrapping", ["tensor", "key", "attribute"])
    @pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
    def test_a_model_with_its_own_loss(self, wrapping: str, streamed: bool) -> None:
        model, (inputs, labels) = OwnLoss(wrapping), vectors()
        batch = {"x": inputs, "labels": labels}
        oracle = full_batch(model, None, batch)
        accumulator = StreamedAccumulator(
            model, sgd(model), None, micro_batch_size=5, normalization="mean"
        )
        given_inputs = (
            iter([{"x": inputs[:3], "labels": labels[:3]}, {"x": inputs[3:], "labels": labels[3:]}])
            if streamed
            else batch
        )
        check_gradients(accumulator, model, oracle, given_inputs, None)

    def test_a_model_with_its_own_loss_over_tokens(self) -> None:
        class Language(Transformer):
            def forward(self, tokens: Tensor, padding: Tensor, labels: Tensor) -> Any:
                return {"loss": functional.cross_entropy(super().forward(tokens, padding), labels)}

        model = Language().double()
        inputs, labels = ragged_tokens()
        batch = {**inputs, "labels": labels}
        accumulator = StreamedAccumulator(
            model, sgd(model), None, micro_batch_size=5, normalization="tokens"
        )
        check_gradients(accumulator, model, full_batch(model, None, batch), batch, None)


def test_an_accumulator_is_in_no_cycle() -> None:
    """Whoever lets go of one has its hooks and its memory back at once."""
    model = nn.Linear(3, 2)
    accumulator = StreamedAccumulator(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        nn.CrossEntropyLoss(),
        micro_batch_size=2,
    )
    accumulator.step(torch.randn(5, 3), torch.randint(0, 2, (5,)))
    gone = weakref.ref(accumulator)
    gc.disable()
    try:
        del accumulator
        assert gone() is None
    finally:
        gc.enable()
