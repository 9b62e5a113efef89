"""Weight gradients that are added by their matrix products: the step is the same, where they are and
where they are left alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tolerances
import torch
from fused_layers import Added, note_added
from reference.full_batch import assert_close, assert_gradients_match, full_batch, gradients_of
from same_step import SPLITS, UNEVEN, check_same_step, every
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional
from torch.nn.utils import parametrizations
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from zoo import convolutional, from_transformers, language
from zoo.case import SAMPLES, Builder

from sbp_fast import StreamedAccumulator

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
MICRO_BATCHES = 3  # of UNEVEN samples: 5 + 5 + 2
WIDTH, CLASSES = 13, 3


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> Added:
    return note_added(monkeypatch)


def mlp() -> nn.Module:
    return nn.Sequential(
        *(nn.Linear(WIDTH, 17), nn.Tanh(), nn.Linear(17, 11, bias=False), nn.Tanh()),
        nn.Linear(11, CLASSES),
    )


def tokens() -> nn.Module:
    """Linear layers on more than two dimensions, of which the second is given a transposed input."""
    return nn.Sequential(
        *(nn.Unflatten(1, (1, WIDTH)), nn.Linear(WIDTH, 6), nn.Tanh(), Transposed()),
        *(nn.Linear(1, 5), nn.Tanh(), nn.Flatten(), nn.Linear(30, CLASSES)),
    )


class Transposed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


def convolutions(kind: type[nn.Conv1d] | type[nn.Conv2d], pixels: tuple[int, ...]) -> nn.Module:
    """On as few pixels as have their gradients added so."""
    return nn.Sequential(
        *(nn.Linear(WIDTH, 41 * 2), nn.Unflatten(1, (41, *pixels)), kind(41, 47, 1), nn.Tanh()),
        *(kind(47, 43, 1, bias=False), nn.Tanh(), nn.Flatten(), nn.Linear(86, CLASSES)),
    )


def conv1d() -> nn.Module:
    return convolutions(nn.Conv1d, (2,))


def conv2d() -> nn.Module:
    return convolutions(nn.Conv2d, (2, 1))


def conv2d_channels_last() -> nn.Module:
    return convolutions(nn.Conv2d, (1, 2)).to(memory_format=torch.channels_last)


def attention() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (WIDTH, 1)),
        nn.Linear(1, 8),
        nn.TransformerEncoderLayer(8, 2, 10, dropout=0.0, batch_first=True),
        *(nn.Flatten(), nn.Linear(8 * WIDTH, CLASSES)),
    )


def with_batch_norm() -> nn.Module:
    return nn.Sequential(
        *(nn.Linear(WIDTH, 9, bias=False), nn.BatchNorm1d(9), nn.Tanh()),
        nn.Linear(9, CLASSES),
    )


def batch(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.randn(SAMPLES, WIDTH).to(dtype), torch.randint(CLASSES, (SAMPLES,))


def accumulator_for(
    model: nn.Module, loss_fn: Any = functional.cross_entropy, **options: Any
) -> StreamedAccumulator:
    options.setdefault("micro_batch_size", UNEVEN)
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    return StreamedAccumulator(model, optimizer, loss_fn, **options)


def check(
    model: nn.Module,
    loss_fn: Any = functional.cross_entropy,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> None:
    """Twice: the second step must not find anything of the first one's."""
    model, (inputs, targets) = model.to(dtype), batch(dtype)
    oracle = full_batch(copy.deepcopy(model), loss_fn, inputs, targets)
    accumulator = accumulator_for(model, loss_fn, **options)
    for _ in range(2):
        buffers = copy.deepcopy(dict(model.named_buffers()))
        result = accumulator.backward(inputs, targets)
        assert_gradients_match(gradients_of(model), oracle.gradients, tolerances.STEP[dtype])
        assert_close(result.grad_norm, oracle.norm, tolerances.STEP[dtype])
        assert_close(result.loss, oracle.loss, tolerances.STEP[dtype])
        model.load_state_dict(buffers, strict=False)


def narrow(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(outputs, targets).bfloat16()


class TestSameStep:
    @SPLITS
    @DTYPES
    @pytest.mark.parametrize("backend", ["auto", "reference"])
    @pytest.mark.parametrize(
        ("build", "layers"),
        [
            (mlp, 3), (tokens, 3), (conv1d, 4), (conv2d, 4), (conv2d_channels_last, 4),
            (attention, 6), (with_batch_norm, 2),
        ],
    )  # fmt: skip
    def test_as_the_whole_batch(
        self,
        build: Callable[[], nn.Module],
        layers: int,
        backend: str,
        dtype: torch.dtype,
        micro_batch_size: int,
        added: Added,
    ) -> None:
        check(build(), dtype=dtype, backend=backend, micro_batch_size=micro_batch_size)
        if build in (conv2d, conv1d, conv2d_channels_last) and micro_batch_size == SAMPLES:
            layers -= 2  # on 24 pixels torch itself is faster
        assert len(added) == layers
        assert set(added.values()) == {2 * -(-SAMPLES // micro_batch_size)}

    @pytest.mark.parametrize("activations", ["keep", "recompute", "offload"])
    @every(language.gpt, from_transformers.vit, convolutional.residual)
    def test_zoo(self, build: Builder, activations: str, added: Added) -> None:
        check_same_step(build, torch.float64, UNEVEN, activations=activations)
        assert len(added) >= (1 if build is convolutional.residual else 6)

    @every(language.gpt_dropout_checkpointed, language.gpt_dropout)
    def test_zoo_with_dropout(self, build: Builder, added: Added) -> None:
        case = build().to(torch.float64)
        gradients = []
        for micro_batch_size in (2, SAMPLES):
            torch.manual_seed(3)
            accumulator = accumulator_for(
                case.model,
                case.loss_fn,
                normalization=case.normalization,
                micro_batch_size=micro_batch_size,
            )
            accumulator.backward(case.inputs, case.targets)
            gradients.append(gradients_of(case.model))
        assert_gradients_match(*gradients, tolerances.STEP[torch.float64])
        assert len(added) >= 4

    def test_clipping_and_a_scaler(self, added: Added) -> None:
        model, (inputs, targets) = mlp(), batch(torch.float32)
        oracle = full_batch(copy.deepcopy(model), functional.cross_entropy, inputs, targets)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        accumulator = accumulator_for(model, grad_scaler=scaler, max_grad_norm=1e9)
        result = accumulator.backward(inputs, targets)
        for parameter in model.parameters():
            parameter.grad /= 8.0
        assert_gradients_match(
            gradients_of(model), oracle.gradients, tolerances.STEP[torch.float32]
        )
        assert_close(result.grad_norm, oracle.norm, tolerances.STEP[torch.float32])
        assert len(added) == 3

    def test_a_loss_in_16_bits_scales_as_it_adds(self, added: Added) -> None:
        """Its share would be rounded: the products are scaled instead."""
        model, (inputs, targets) = mlp(), batch(torch.float32)
        oracle = full_batch(copy.deepcopy(model), functional.cross_entropy, inputs, targets)
        accumulator_for(model, narrow, normalization="mean").backward(inputs, targets)
        assert_gradients_match(
            gradients_of(model), oracle.gradients, tolerances.STEP[torch.float32]
        )
        assert len(added) == 3

    @pytest.mark.parametrize(("build", "layers"), [(mlp, 3), (with_batch_norm, 2)])
    def test_over_all_samples(
        self, build: Callable[[], nn.Module], layers: int, added: Added
    ) -> None:
        def contrastive(outputs: Tensor, targets: Tensor) -> Tensor:
            return functional.cross_entropy(outputs @ outputs.T, targets)

        check(build(), contrastive, cross_sample_loss=True)
        assert len(added) == layers
        assert set(added.values()) == {2 * MICRO_BATCHES}

    def test_the_gradient_is_laid_out_as_the_weight(self, added: Added) -> None:
        model, (inputs, targets) = conv2d_channels_last(), batch(torch.float32)
        model[0].weight = nn.Parameter(model[0].weight.detach().t().contiguous().t())
        accumulator_for(model).backward(inputs, targets)
        for parameter in model.parameters():
            assert parameter.grad is not None
            assert parameter.grad.stride() == parameter.stride()
        assert len(added) == 4

    def test_values_that_are_not_finite_are_seen(self, added: Added) -> None:
        model, (inputs, targets) = mlp(), batch(torch.float32)
        inputs[3, 0] = 1e38
        model[0].weight.data[:, 0] = 0.0
        for backend in ("auto", "reference"):
            result = accumulator_for(
                model, lambda y, t: 1e9 * functional.cross_entropy(y, t), backend=backend,
                normalization="mean",
            ).step(inputs, targets)  # fmt: skip
            assert result.skipped
        assert added


class TestUsed:
    def test_where_the_weight_is_large(self, monkeypatch: pytest.MonkeyPatch) -> None:
        added = note_added(monkeypatch, least_bytes=None)
        model = nn.Sequential(nn.Linear(WIDTH, 512), nn.Linear(512, 1024), nn.Linear(1024, 511))
        inputs, targets = torch.randn(4, WIDTH), torch.randn(4, 511)
        accumulator_for(model, nn.MSELoss(), micro_batch_size=2).step(inputs, targets)
        assert added == {2: 2}, "of 2 MiB, from which on calls of ours are worth their while"

    def test_when_biases_or_inputs_are_frozen(self, added: Added) -> None:
        model = mlp()
        model[0].bias.requires_grad_(False)
        check(model)
        assert added == {0: 6, 1: 6, 2: 6}

    def test_under_a_default_device(self, added: Added) -> None:
        with torch.device("cpu"):
            check(mlp())
        assert len(added) == 3

    def test_by_subclasses_that_call_the_function(self, added: Added) -> None:
        class Scaled(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                return functional.linear(input=2 * x, weight=self.weight, bias=self.bias)

        check(nn.Sequential(Scaled(WIDTH, 7), nn.Tanh(), nn.Linear(7, CLASSES)))
        assert len(added) == 2

    def test_when_unused_by_some_micro_batches(self, added: Added) -> None:
        class Rare(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.always, self.rare = nn.Linear(WIDTH, CLASSES), nn.Linear(WIDTH, CLASSES)

            def forward(self, x: Tensor) -> Tensor:
                chosen = (x[:, :1] > 1.2).to(x.dtype)
                y = self.always(x)
                return y + chosen * self.rare(x) if bool(chosen.any()) else y

        for backend in ("auto", "reference"):
            added.clear()
            torch.manual_seed(1)
            check(Rare(), micro_batch_size=1, backend=backend)
            assert added[0] == 2 * SAMPLES
            assert 0 < added[2] < 2 * SAMPLES


class Tied(nn.Module):
    """One layer twice, and one whose weight something else uses as well."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.shared = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.once = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.twice(torch.tanh(self.twice(x))))
        return self.once(torch.tanh(self.shared(x)) + x @ self.shared.weight)


class Reentrant(nn.Module):
    """Of which a part is computed in the middle of the backward pass, with a graph of its own."""

    def __init__(self) -> None:
        super().__init__()
        # Without a bias, which would come in two parts and have all statistics computed anew.
        self.first, self.shared = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.last = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.shared(self.first(x))
        x = checkpoint(lambda x: torch.tanh(self.shared(x)), x, use_reentrant=True)
        return self.last(x)


class Penalised(nn.Module):
    """Its loss has the gradient of its outputs with respect to its inputs in it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = mlp()

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        y = self.layers(x)
        (slope,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return functional.cross_entropy(y, targets) + slope.square().mean()


class LooksAtGradients(nn.Module):
    """Computes with gradients of its own weights, in its forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.first(x)
        (gradient,) = torch.autograd.grad(inner.sum(), self.first.weight, retain_graph=True)
        assert bool((gradient != 0.0).any())
        return self.last(torch.tanh(inner))


class TestLeftAlone:
    @pytest.mark.parametrize("backend", ["auto", "reference"])
    def test_weights_with_several_uses(self, backend: str, added: Added) -> None:
        check(Tied(), backend=backend)
        assert added == {4: 2 * MICRO_BATCHES}

    @pytest.mark.parametrize("backend", ["auto", "reference"])
    @pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
    def test_reentrant_checkpoints(self, backend: str, added: Added) -> None:
        """The part that a checkpoint computes is added by autograd, also where there is another."""
        check(Reentrant(), backend=backend)
        assert len(added) == 3

    @pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
    def test_reentrant_checkpoints_with_scaled_gradients(self, added: Added) -> None:
        """The part that a checkpoint brings first has yet to be written when the product is added."""
        model, (inputs, targets) = Reentrant(), batch(torch.float32)
        oracle = full_batch(copy.deepcopy(model), functional.cross_entropy, inputs, targets)
        accumulator_for(model, narrow, normalization="mean").backward(inputs, targets)
        assert_gradients_match(
            gradients_of(model), oracle.gradients, tolerances.STEP[torch.float32]
        )
        assert len(added) == 3

    @pytest.mark.parametrize("backend", ["auto", "reference"])
    def test_double_backward(self, backend: str, added: Added) -> None:
        model, (inputs, targets) = Penalised().double(), batch()
        losses = [model(x, y) for x, y in zip(inputs.split(1), targets.split(1), strict=True)]
        torch.stack(losses).mean().backward()
        expected = gradients_of(model)
        accumulator = accumulator_for(model, None, normalization="mean", micro_batch_size=1,
                                      backend=backend)  # fmt: skip
        accumulator.backward((inputs, targets))
        assert_gradients_match(gradients_of(model), expected, tolerances.STEP[torch.float64])
        assert not added, "each weight is in the slope as well"

    def test_gradients_that_the_model_asks_for(self, added: Added) -> None:
        check(LooksAtGradients())
        assert added == {0: 6, 2: 6}

    @pytest.mark.parametrize("backend", ["auto", "reference"])
    @pytest.mark.parametrize("hook", ["register_hook", "register_post_accumulate_grad_hook"])
    def test_weights_with_hooks_of_others(self, hook: str, backend: str, added: Added) -> None:
        model, (inputs, targets) = mlp().double(), batch()
        seen = []
        handle = getattr(model[2].weight, hook)(lambda gradient: seen.append(gradient.shape))
        accumulator = accumulator_for(model, backend=backend)
        accumulator.backward(inputs, targets)
        assert len(seen) == MICRO_BATCHES
        assert added == {0: 3, 3: 3}
        handle.remove()
        # Its own hooks go with it.
        del accumulator
        accumulator_for(model, backend=backend).backward(inputs, targets)
        assert added == {0: 6, 2: 3, 3: 6}

    def test_frozen_weights(self, added: Added) -> None:
        model = mlp()
        model[2].weight.requires_grad_(False)
        check(model)
        assert model[2].weight.grad is None
        assert added == {0: 6, 2: 6}

    def test_weights_that_are_computed(self, added: Added) -> None:
        model = mlp()
        parametrizations.weight_norm(model[0])
        check(model)
        assert len(added) == 2

    def test_layers_that_do_not_call_the_function(self, added: Added) -> None:
        class Own(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                return x @ self.weight.T + self.bias

        check(nn.Sequential(Own(WIDTH, 9), nn.Tanh(), nn.Linear(9, CLASSES)))
        assert added == {2: 6}

    @pytest.mark.parametrize("options", [{"autocast": torch.bfloat16}, {}], ids=["autocast", "all"])
    def test_16_bits_on_the_cpu(self, options: dict[str, Any], added: Added) -> None:
        dtype = torch.float32 if options else torch.bfloat16
        model, (inputs, targets) = mlp().to(dtype), batch(dtype)
        oracle = full_batch(copy.deepcopy(model), functional.cross_entropy, inputs, targets)
        accumulator_for(model, **options).backward(inputs, targets)
        bound = tolerances.STEP[torch.bfloat16]
        assert_gradients_match(gradients_of(model), oracle.gradients, bound)
        assert not added

    def test_modes_of_others(self, added: Added) -> None:
        class Seeing(TorchFunctionMode):
            def __init__(self) -> None:
                super().__init__()
                self.calls = 0

            def __torch_function__(
                self, function: Any, types: Any, args: Any = (), kwargs: Any = None
            ) -> Any:
                self.calls += function is torch._C._nn.linear
                return function(*args, **(kwargs or {}))

        model, (inputs, targets) = mlp().double(), batch()
        accumulator = accumulator_for(model, probe=False)
        with Seeing() as seeing:
            accumulator.backward(inputs, targets)
        assert seeing.calls == 3 * MICRO_BATCHES
        assert not added

    def test_transforms(self, added: Added) -> None:
        class PerSample(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.mapped, self.called, self.last = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

            def forward(self, x: Tensor) -> Tensor:
                x = torch.vmap(self.mapped)(x[:, None])[:, 0]
                doubled = {"weight": 2 * self.called.weight}
                x = torch.func.functional_call(self.called, doubled, (torch.tanh(x),))
                _, tangent = torch.func.jvp(self.mapped, (x,), (torch.ones_like(x),))
                with forward_ad.dual_level():
                    dual = self.mapped(forward_ad.make_dual(x, torch.ones_like(x)))
                    tangent = tangent + forward_ad.unpack_dual(dual).tangent
                return self.last(x * tangent)

        check(PerSample())
        assert added == {4: 6}

    def test_compiled_code(self, added: Added) -> None:
        """The same graph as without us, whoever else makes a step."""
        model, (inputs, targets) = mlp().double(), batch()
        oracle = full_batch(copy.deepcopy(model), functional.cross_entropy, inputs, targets)
        graphs: list[list[Any]] = []

        def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
            graphs.append([node.target for node in graph.graph.nodes if node.op != "placeholder"])
            return graph

        first = torch.compile(model[:2], backend=backend, fullgraph=True)
        first(inputs[: SAMPLES // 2])
        for others in range(2):
            compiled = nn.Sequential(first, copy.deepcopy(model[2:]))
            accumulator = accumulator_for(compiled, probe=False, micro_batch_size=SAMPLES // 2)
            accumulator.backward(inputs, targets)
            gradients = [parameter.grad for parameter in compiled.parameters()]
            assert_gradients_match(
                dict(zip(oracle.gradients, gradients, strict=True)),
                oracle.gradients,
                tolerances.STEP[torch.float64],
            )
            # Once before the step, and once in the first.
            assert len(graphs) == 2, others
        assert graphs[0] == graphs[1]
        assert added == {2: 4, 3: 4}

    @pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
    def test_scripted_code(self, added: Added) -> None:
        model, (inputs, targets) = mlp().double(), batch()
        oracle = full_batch(copy.deepcopy(model), functional.cross_entropy, inputs, targets)
        scripted = torch.jit.script(model)
        accumulator_for(scripted, probe=False).backward(inputs, targets)
        assert_gradients_match(
            gradients_of(scripted), oracle.gradients, tolerances.STEP[torch.float64]
        )
        assert not added

    def test_functions_of_others(self, added: Added, monkeypatch: pytest.MonkeyPatch) -> None:
        calls: list[Any] = []

        def theirs(*args: Any) -> Tensor:
            calls.append(args)
            return torch._C._nn.linear(*args)

        monkeypatch.setattr(functional, "linear", theirs)
        check(mlp(), probe=False)
        assert len(calls) >= 3 * 2 * MICRO_BATCHES
        assert functional.linear is theirs
        assert not added


class TestInterception:
    def test_ends_with_the_step(self, added: Added) -> None:
        names = {"linear": torch._C._nn.linear, "conv1d": torch.conv1d, "conv2d": torch.conv2d}
        seen: list[Any] = []

        class Failing(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                seen.append(functional.linear)
                if len(seen) > 2:
                    raise LookupError("third")
                return x

        model, (inputs, targets) = nn.Sequential(mlp(), Failing()).double(), batch()
        with pytest.raises(LookupError, match="third"):
            accumulator_for(model, probe=False).backward(inputs, targets)
        assert all(function is not names["linear"] for function in seen)
        for name, native in names.items():
            assert getattr(functional, name) is native

    def test_what_is_wrong_is_said_by_torch(self, added: Added) -> None:
        model = nn.Sequential(nn.Linear(WIDTH + 1, CLASSES)).double()
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            accumulator_for(model, probe=False).backward(*batch())

    def test_small_models_are_not_touched(self) -> None:
        seen: list[Any] = []

        class Looking(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                seen.append(functional.linear)
                return x

        accumulator_for(nn.Sequential(mlp(), Looking()).double()).backward(*batch())
        assert set(seen) == {torch._C._nn.linear}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    yield
    torch.compiler.reset()
