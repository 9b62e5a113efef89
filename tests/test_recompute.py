"""``activations="recompute"``: what blocks may be given and may do, what is left behind, and memory."""

from __future__ import annotations

import gc
import random
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import tolerances
import torch
from reference.full_batch import assert_gradients_match, full_batch, gradients_of
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import CheckpointError, checkpoint
from unchanged import State

from sbp_fast import StreamedAccumulator
from sbp_fast.memory import LiveBytes, memory_budget

SAMPLES, MICRO, WIDTH, CLASSES = 11, 4, 8, 5
STEP = tolerances.STEP[torch.float64]


class Block(nn.Module):
    """Counts its calls, in a buffer and beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.register_buffer("calls", torch.zeros(()))
        self.computed = 0

    def forward(self, x: Tensor) -> Any:
        self.computed += 1
        self.calls += 1
        return x + self.second(torch.tanh(self.first(x)))


class Net(nn.Module):
    def __init__(self, kind: Callable[[], nn.Module] = Block) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(kind() for _ in range(3))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Careful(Net):
    """Has checkpoints of its own."""

    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.use_reentrant)
        return self.head(x)


def vectors() -> tuple[Tensor, Tensor]:
    return torch.randn(SAMPLES, WIDTH).double(), torch.randint(CLASSES, (SAMPLES,))


def accumulator_for(model: nn.Module, **options: Any) -> StreamedAccumulator:
    options.setdefault("activations", "recompute")
    return StreamedAccumulator(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        options.pop("loss_fn", nn.CrossEntropyLoss()),
        micro_batch_size=MICRO,
        probe=False,
        **options,
    )


def check_against_the_whole_batch(model: nn.Module) -> None:
    model.double()
    inputs, targets = vectors()
    oracle = full_batch(model, nn.CrossEntropyLoss(), inputs, targets)
    accumulator = accumulator_for(model)
    for _ in range(2):  # by the second time it is known which blocks write to their inputs
        accumulator.backward(inputs.clone(), targets)
        assert_gradients_match(gradients_of(model), oracle.gradients, STEP)


class TestWhatBlocksAreGiven:
    def test_everything_but_inputs_is_computed_twice(self) -> None:
        model = Net().double()
        accumulator_for(model).backward(*vectors())
        assert [block.computed for block in model.blocks] == [2 * 3] * 3
        accumulator_for(model, activations="keep").backward(*vectors())
        assert [block.computed for block in model.blocks] == [2 * 3 + 3] * 3

    def test_keywords_and_things_that_are_no_tensors(self) -> None:
        class Asked(Block):
            def forward(self, x: Tensor, *, debug: Tensor, mode: str, pair: Any, fn: Any) -> Any:
                assert mode == "twice"
                return {"x": fn(super().forward(x) * debug) + pair[1]["shift"], "debug": debug}

        class Asking(Net):
            def forward(self, x: Tensor) -> Tensor:
                debug = x.mean(1, keepdim=True)
                for block in self.blocks:
                    # Names that torch's checkpoint has for itself.
                    pair = (None, {"shift": x.sum(1, keepdim=True)})
                    out = block(x, debug=debug, mode="twice", pair=pair, fn=torch.sin)
                    x, debug = out["x"], out["debug"]
                return self.head(x)

        check_against_the_whole_batch(Asking(Asked))

    def test_lists_that_a_block_adds_to(self) -> None:
        class Adding(Block):
            def forward(self, x: Tensor, seen: list[Tensor]) -> tuple[Tensor, None]:
                x = super().forward(x)
                seen.append(x)
                return x, None

        class Collecting(Net):
            def forward(self, x: Tensor) -> Tensor:
                seen: list[Tensor] = []
                for block in self.blocks:
                    x, _ = block(x, seen)
                assert len(seen) == len(self.blocks)
                return self.head(torch.stack(seen).sum(0))

        check_against_the_whole_batch(Collecting(Adding))

    def test_objects_that_a_block_adds_to(self) -> None:
        """A cache, as Transformers hands it from block to block while it trains."""

        class Cache:
            def __init__(self) -> None:
                self.seen: list[Tensor] = []
                self.by_name: dict[str, Any] = {"self": self, "pair": (self.seen, nn.ReLU)}

        class Remembering(Block):
            def forward(self, x: Tensor, cache: Cache) -> Tensor:
                x = super().forward(x)
                assert cache.by_name["self"] is cache
                cache.by_name["pair"][0].append(x)
                return x + torch.tanh(torch.stack(cache.seen).sum(0))

        class Caching(Net):
            def forward(self, x: Tensor) -> Tensor:
                cache = Cache()
                for block in self.blocks:
                    x = block(x, cache)
                assert len(cache.seen) == len(self.blocks)
                return self.head(x)

        check_against_the_whole_batch(Caching(Remembering))

    def test_a_block_that_is_called_several_times(self) -> None:
        class Repeating(Net):
            def forward(self, x: Tensor) -> Tensor:
                for block in (*self.blocks, self.blocks[0], self.blocks[0]):
                    x = block(x)
                return self.head(x)

        check_against_the_whole_batch(Repeating())

    def test_a_block_that_writes_to_its_input(self) -> None:
        class Writing(Block):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(functional.relu_(x))

        class Doubling(Net):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x * 2.0)

        check_against_the_whole_batch(Doubling(Writing))

    def test_a_row_of_layers(self) -> None:
        layers = [nn.Sequential(), *(nn.Linear(WIDTH, WIDTH) for _ in range(6))]
        activations = [nn.Tanh() for _ in layers[1:]]
        row = [layer for pair in zip(layers[1:], activations, strict=True) for layer in pair]
        check_against_the_whole_batch(nn.Sequential(*row, nn.Linear(WIDTH, CLASSES)))

    def test_a_single_layer(self) -> None:
        check_against_the_whole_batch(nn.Linear(WIDTH, CLASSES))


class TestOnlyOnce:
    def test_buffers(self) -> None:
        model = Net().double()
        accumulator_for(model).backward(*vectors())
        assert [float(block.calls) for block in model.blocks] == [3.0] * 3

    def test_buffers_that_are_replaced(self) -> None:
        class Replacing(Block):
            def forward(self, x: Tensor) -> Any:
                self.calls = self.calls + 1
                return super().forward(x) * self.calls

        models = []
        for activations in ("keep", "recompute"):
            torch.manual_seed(0)
            models.append(Net(Replacing).double())
            accumulator_for(models[-1], activations=activations).backward(*vectors())
        assert [float(block.calls) for block in models[1].blocks] == [2 * 3.0] * 3
        assert_gradients_match(gradients_of(models[1]), gradients_of(models[0]), STEP)

    def test_buffers_that_forward_goes_on_from(self) -> None:
        """Spectral norm takes one step of a power iteration in every forward pass."""
        models = []
        for activations in ("keep", "recompute"):
            torch.manual_seed(0)
            model = Net()
            for block in model.blocks:
                parametrizations.spectral_norm(block.first)
            models.append(model.double())
            torch.manual_seed(1)
            accumulator_for(model, activations=activations).backward(*vectors())
        assert_gradients_match(gradients_of(models[1]), gradients_of(models[0]), STEP)
        for (name, kept), buffer in zip(
            models[0].named_buffers(), models[1].buffers(), strict=True
        ):
            assert torch.equal(kept, buffer), name

    @pytest.mark.filterwarnings("ignore:Full backward hook is firing")
    def test_hooks_on_blocks(self) -> None:
        model, seen = Net().double(), []
        for block in model.blocks:
            block.register_forward_pre_hook(lambda *_: seen.append("before"))
            block.register_forward_hook(lambda *_: seen.append("after"))
            block.register_full_backward_hook(lambda *_: seen.append("backward"))
        accumulator_for(model).backward(*vectors())
        kept = list(seen)
        seen.clear()
        accumulator_for(model, activations="keep").backward(*vectors())
        assert kept == seen
        assert len(seen) == 3 * 3 * 3

    def test_models_that_have_checkpoints_of_their_own(self) -> None:
        """Within torch's checkpoint another one costs no third time."""
        model = Careful(use_reentrant=False).double()
        accumulator_for(model).backward(*vectors())
        assert [block.computed for block in model.blocks] == [2 * 3] * 3

    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_and_have_their_gradients(self, use_reentrant: bool) -> None:
        check_against_the_whole_batch(Careful(use_reentrant))

    def test_blocks_in_which_micro_batches_wait_for_one_another(self) -> None:
        """Between meeting points they would be computed again and again."""

        class Normalised(Block):
            def __init__(self) -> None:
                super().__init__()
                self.norm = nn.BatchNorm1d(WIDTH)

            def forward(self, x: Tensor) -> Any:
                return self.norm(super().forward(x))

        model = Net(Normalised)
        model.blocks[1].norm.eval()
        check_against_the_whole_batch(model)
        assert [block.computed for block in model.blocks] == [2 * 3, 2 * 2 * 3, 2 * 3]

    def test_the_pass_without_gradients(self) -> None:
        """Of a loss over all samples: nothing is kept there, so nothing is computed again."""

        def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
            return (outputs @ outputs.T).square().mean()

        model = Net().double()
        accumulator_for(model, loss_fn=loss_fn, cross_sample_loss=True).backward(*vectors())
        assert [block.computed for block in model.blocks] == [3 + 2 * 3] * 3


class TestWhatIsLeftBehind:
    def test_nothing(self) -> None:
        model = Net().double()
        attributes = [set(vars(module)) for module in model.modules()]
        accumulator_for(model).step(*vectors())
        assert [set(vars(module)) for module in model.modules()] == attributes

    def test_nothing_after_an_exception(self) -> None:
        class Raising(Block):
            armed = False

            def forward(self, x: Tensor) -> Any:
                if Raising.armed and torch._C._current_graph_task_id() != -1:
                    raise LookupError("mine")
                return super().forward(x)

        model = Net(Raising).double()
        attributes = [set(vars(module)) for module in model.modules()]
        accumulator = accumulator_for(model)
        accumulator.step(*vectors())
        for block in model.blocks:
            block.computed = 0
        state = State(model, accumulator._optimizer)
        Raising.armed = True
        with pytest.raises(LookupError, match="mine"):
            accumulator.step(*vectors())
        state.check()
        assert [set(vars(module)) for module in model.modules()] == attributes

    def test_a_method_of_the_instances_own(self) -> None:
        model = Net().double()
        mine = model.blocks[0].forward = lambda x: x * 2.0  # type: ignore[method-assign]
        accumulator_for(model).step(*vectors())
        assert vars(model.blocks[0])["forward"] is mine


class TestRefusals:
    def test_another_result_the_second_time(self) -> None:
        class Fickle(Block):
            def forward(self, x: Tensor) -> Any:
                for _ in range(random.randrange(1, 1000)):
                    x = torch.sin(x)
                return super().forward(x)

        model = Net(Fickle).double()
        accumulator = accumulator_for(model)
        state = State(model, accumulator._optimizer)
        with pytest.raises(CheckpointError, match="activations='recompute' computes each block"):
            accumulator.step(*vectors())
        for block in model.blocks:
            assert float(block.calls) == 0.0
        state.check()

    @pytest.mark.parametrize("where", ["model", "blocks"])
    def test_compiled_models(self, where: str) -> None:
        """Blocks may be compiled; of a model that is, nothing can be taken apart."""
        model = Net().double()
        inputs, targets = vectors()
        oracle = full_batch(model, nn.CrossEntropyLoss(), inputs, targets)
        compiled = model
        if where == "model":
            compiled = torch.compile(model, backend="eager")  # type: ignore[assignment]
        else:
            model.blocks[0] = torch.compile(model.blocks[0], backend="eager")
            model.blocks[1].compile(backend="eager")
        accumulator = accumulator_for(compiled)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            accumulator.backward(inputs, targets)
        warned = [str(w.message) for w in caught if "activations='recompute'" in str(w.message)]
        assert len(warned) == (where == "model")
        # A compiled block has its parameters under another name.
        found = dict(zip(oracle.gradients, gradients_of(model).values(), strict=True))
        assert_gradients_match(found, oracle.gradients, STEP)
        assert model.blocks[2].computed == (3 if where == "model" else 6)


def deep(blocks: int = 24, width: int = 64) -> nn.Module:
    return nn.Sequential(
        *(
            nn.Sequential(nn.Linear(width, 2 * width), nn.Tanh(), nn.Linear(2 * width, width))
            for _ in range(blocks)
        )
    )


def peak_of(activations: str) -> tuple[int, int]:
    """Bytes that a second step of a deep model needs, and those that wait on the host."""
    torch.manual_seed(0)
    model = deep()
    accumulator = StreamedAccumulator(
        model,
        torch.optim.SGD(model.parameters(), lr=0.01, foreach=False),
        nn.MSELoss(),
        micro_batch_size=256,
        activations=activations,
    )
    inputs = torch.randn(512, 64)
    with memory_budget("cpu", None) as memory:
        memory.track(model.parameters())
        accumulator.step(inputs, inputs)
        result = accumulator.step(inputs, inputs)
    assert result.peak_bytes is not None
    return result.peak_bytes, result.host_bytes


class TestMemory:
    def test_peaks(self) -> None:
        keep, _ = peak_of("keep")
        recompute, _ = peak_of("recompute")
        offload, waiting = peak_of("offload")
        parameters = sum(parameter.nbytes for parameter in deep().parameters())
        assert keep - 2 * parameters > 2 * (recompute - 2 * parameters)
        assert keep - 2 * parameters > 5 * (offload - 2 * parameters)
        # What has left the device is on the host.
        assert waiting > 0.8 * (keep - offload)

    @pytest.mark.parametrize("activations", ["recompute", "offload"])
    def test_a_step_that_runs_out_of_memory_leaves_nothing(self, activations: str) -> None:
        model, inputs = deep(8), torch.randn(512, 64)
        accumulator = StreamedAccumulator(
            model,
            torch.optim.SGD(model.parameters(), lr=0.01, foreach=False),
            nn.MSELoss(),
            micro_batch_size=256,
            activations=activations,
        )
        with memory_budget("cpu", None) as free:
            free.track(model.parameters())
            accumulator.step(inputs, inputs)
        state = State(model, accumulator._optimizer)
        with LiveBytes() as one_sample:
            one_sample.track(model.parameters())
            accumulator.backward(inputs[:1], inputs[:1])
        model.zero_grad()
        for share in (0.55, 0.95):  # in the forward pass, and in the backward pass
            limited = LiveBytes(int(share * one_sample.peak_bytes))
            limited.track(model.parameters())
            before = limited.live_bytes
            with limited, pytest.raises(torch.OutOfMemoryError) as caught:
                accumulator.step(inputs, inputs)
            del caught
            gc.collect()
            assert limited.live_bytes == before
            state.check()
        assert not accumulator.step(inputs, inputs).skipped

    def test_recompute_is_near_its_lower_bound(self) -> None:
        model = deep()
        parameters = sum(parameter.nbytes for parameter in model.parameters())
        block, inputs = model[0], torch.randn(256, 64)
        with LiveBytes() as alone:
            block(inputs.clone().requires_grad_()).backward(inputs.clone())
        own = alone.peak_bytes - 2 * sum(parameter.nbytes for parameter in block.parameters())
        bound = 2 * parameters + len(model) * inputs.nbytes + own
        recompute, _ = peak_of("recompute")
        assert bound <= 1.1 * recompute, "a bound that is not low tells nothing"
        assert recompute <= 1.1 * bound
