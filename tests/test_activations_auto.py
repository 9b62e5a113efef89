"""``activations="auto"``: what is chosen for which budget, and that the step stays what it is."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import tolerances
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.full_batch import assert_gradients_match, buffers_of, full_batch, gradients_of
from reference.running_statistics import assert_buffers_match
from same_step import UNEVEN, accumulator_for, all_gradients
from torch import Tensor, nn
from zoo import contrastive, convolutional, dropout_layers, language
from zoo.case import Builder

from sbp_fast import StepResult, StreamedAccumulator, plan
from sbp_fast.activations import Automatic, Policy
from sbp_fast.activations.blocks import find_blocks
from sbp_fast.cli import main
from sbp_fast.memory import memory_budget
from sbp_fast.memory.out_of_memory import NothingSmallerError
from sbp_fast.planning import BudgetError, automatic
from sbp_fast.planning.block_costs import BlockCost
from sbp_fast.planning.choice import ENOUGH_SAMPLES, relative_step_time, time_of_recomputation
from sbp_fast.planning.fake_step import FakeSteps
from sbp_fast.planning.peak import Reading
from sbp_fast.planning.policies import PolicyPeaks

WIDTH, CLASSES, SAMPLES, MICRO, BLOCKS = 16, 5, 48, 16, 4
STEP = tolerances.STEP[torch.float64]


class Block(nn.Module):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(torch.tanh(self.first(x)))


def network(blocks: int = BLOCKS, kind: Callable[[], nn.Module] = Block) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(*(kind() for _ in range(blocks)), nn.Linear(WIDTH, CLASSES)).double()


def batch(samples: int = SAMPLES, width: int = WIDTH) -> tuple[Tensor, Tensor]:
    torch.manual_seed(2)
    return torch.randn(samples, width).double(), torch.randint(CLASSES, (samples,))


def automatic_for(model: nn.Module, budget: int | None, size: Any = MICRO, **options: Any) -> Any:
    return StreamedAccumulator(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        options.pop("loss_fn", nn.CrossEntropyLoss()),
        micro_batch_size=size,
        memory_budget=budget,
        probe=False,
        **{"activations": "auto", **options},
    )


def result_of(accumulator: Any, model: nn.Module, inputs: Any, targets: Any = None) -> StepResult:
    with memory_budget("cpu", None) as memory:
        memory.track([*model.parameters(), *model.buffers()])
        result: StepResult = accumulator.backward(inputs, targets)
        return result


def peak_under(
    policy: Policy, size: int = MICRO, model: nn.Module | None = None, samples: int = SAMPLES
) -> int:
    """Counted in a second step: until it is seen that none changes its inputs, blocks copy them."""
    model = network() if model is None else model
    accumulator = automatic_for(model, None, size)
    accumulator._activations.policy = policy
    for _ in range(2):
        result = result_of(accumulator, model, *batch(samples))
        model.zero_grad()
    assert result.peak_bytes is not None
    return result.peak_bytes


@pytest.fixture(scope="module")
def peaks() -> dict[str, int]:
    return {name: peak_under(Policy(name)) for name in ("keep", "recompute")}


@pytest.fixture(autouse=True)
def _small_tensors_travel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sbp_fast.activations.offload._SMALLEST_BYTES", 64)


class TestWantedSize:
    def test_all_is_kept_where_it_fits(self, peaks: dict[str, int]) -> None:
        result = automatic_for(network(), peaks["keep"]).backward(*batch())
        assert (result.activations, result.micro_batch_size) == ("keep", MICRO)
        assert result.peak_bytes == peaks["keep"]

    @pytest.mark.parametrize("part", [0.99, 0.5, 0.0])
    def test_no_more_blocks_are_computed_again_than_must_be(
        self, peaks: dict[str, int], part: float
    ) -> None:
        budget = round(peaks["recompute"] + part * (peaks["keep"] - peaks["recompute"]))
        model = network()
        oracle = full_batch(model, nn.CrossEntropyLoss(), *batch())
        accumulator = automatic_for(model, budget)
        result = accumulator.backward(*batch())
        assert result.micro_batches == SAMPLES // MICRO
        assert result.peak_bytes <= budget
        assert_gradients_match(gradients_of(model), oracle.gradients, STEP)
        policy = accumulator._activations.policy
        assert result.activations == str(policy)
        assert re.fullmatch(rf"recompute [1-{BLOCKS - 1}] of {BLOCKS} blocks", str(policy))
        for key in policy.recomputed:
            without = Policy("recompute", policy.recomputed - {key}, BLOCKS)
            assert peak_under(without, model=model) > budget

    def test_the_first_step_copies_no_inputs_of_blocks(self) -> None:
        """A step that nobody has planned does, until it is seen that none changes them."""
        samples = 256
        budget = peak_under(Policy("recompute"), samples, samples=samples)
        result = automatic_for(network(), budget, samples).backward(*batch(samples))
        assert result.activations.startswith("recompute")
        assert result.micro_batches == 1

    def test_what_no_block_holds_is_offloaded(self) -> None:
        model = Outside()
        kept, least, offloaded = (
            peak_under(Policy(name), model=model) for name in ("keep", "recompute", "offload")
        )
        budget = (least + offloaded) // 2
        assert offloaded < budget < least <= kept
        oracle = full_batch(model, nn.CrossEntropyLoss(), *batch())
        result = automatic_for(model, budget).backward(*batch())
        assert (result.activations, result.micro_batch_size) == ("offload", MICRO)
        assert result.host_bytes > 0
        assert result.peak_bytes is not None
        assert result.peak_bytes <= budget
        assert_gradients_match(gradients_of(model), oracle.gradients, STEP)

    def test_too_little_for_a_single_sample_says_what_would_do(self) -> None:
        model = network(2)
        parameters = 8 * sum(parameter.numel() for parameter in model.parameters())
        with pytest.raises(NothingSmallerError, match="smallest memory_budget that would") as error:
            automatic_for(model, round(1.5 * parameters)).backward(*batch())
        words = re.search(
            r"would do is (\d+) bytes .* with micro_batch_size=(\d+)", str(error.value)
        )
        assert words is not None
        result = automatic_for(network(2), int(words[1]), int(words[2])).backward(*batch())
        assert result.peak_bytes == int(words[1])
        assert "(activations: recompute)" in str(error.value)

    def test_micro_batches_become_smaller_where_the_plan_was_wrong(
        self, peaks: dict[str, int]
    ) -> None:
        class Larger(nn.Linear):
            """Takes memory that no plan sees."""

            def forward(self, x: Tensor) -> Tensor:
                scratch = torch.empty(0 if is_fake(x) else 2000 * len(x), dtype=torch.uint8)
                outputs = super().forward(x)
                del scratch
                return outputs

        model = network()
        model[-1] = Larger(WIDTH, CLASSES).double()
        accumulator = automatic_for(model, peaks["keep"])
        result = accumulator.backward(*batch())
        assert result.micro_batches > SAMPLES // MICRO
        assert result.peak_bytes <= peaks["keep"]
        model.zero_grad()
        result = accumulator.backward(*batch())
        assert (result.activations, result.micro_batch_size) == ("keep", MICRO // 2)


class Outside(nn.Module):
    """Most of what is saved is saved outside of any block."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = network()
        self.scale = nn.Parameter(torch.ones(32 * WIDTH).double())

    def forward(self, x: Tensor) -> Tensor:
        wide = x.repeat(1, 32) * self.scale
        for _ in range(6):
            wide = torch.tanh(wide)
        return self.blocks(wide[:, :WIDTH])


def is_fake(tensor: Tensor) -> bool:
    return type(tensor).__name__ == "FakeTensor"


class TestFreeSize:
    def test_enough_samples_are_kept(self) -> None:
        budget = peak_under(Policy("keep"), ENOUGH_SAMPLES)
        result = automatic_for(network(), budget, "auto").backward(*batch())
        assert (result.activations, result.micro_batch_size) == ("keep", ENOUGH_SAMPLES)

    def test_blocks_are_computed_again_where_too_few_would_fit(self) -> None:
        model = network()
        oracle = full_batch(model, nn.CrossEntropyLoss(), *batch())
        budget = peak_under(Policy("keep"), 2)
        accumulator = automatic_for(model, budget, "auto")
        result = accumulator.backward(*batch())
        assert_gradients_match(gradients_of(model), oracle.gradients, STEP)
        assert result.peak_bytes is not None
        assert result.peak_bytes <= budget
        assert result.activations.startswith("recompute")
        policy, size = accumulator._activations.policy, result.micro_batch_size
        assert size > 2
        for key in policy.recomputed or ():
            without = Policy("recompute", policy.recomputed - {key}, BLOCKS)
            assert peak_under(without, size, model) > budget

    def test_too_little_is_an_error_that_says_what_would_do(self) -> None:
        with pytest.raises(BudgetError, match="the least that would do is") as error:
            automatic_for(network(2), 1000, "auto").backward(*batch())
        needed = error.value.smallest_budget
        result = automatic_for(network(2), needed, "auto").backward(*batch())
        assert result.peak_bytes == needed
        with pytest.raises(BudgetError):
            automatic_for(network(2), needed - 1, "auto").backward(*batch())

    def test_the_model_of_time(self) -> None:
        """As long with all blocks computed again at any size, as kept with enough samples."""
        many = 10**9
        again = relative_step_time(many, many, time_of_recomputation(1.0)) / many
        kept = relative_step_time(many, ENOUGH_SAMPLES, 0.0) / many
        assert kept == pytest.approx(again)


class Known:
    """Steps on 24 samples of eight equal blocks: 10 bytes a sample, one less for each block that is
    computed again, and one in all where they are offloaded."""

    waits_for_all = meets = False
    blocks = 8

    def __init__(self, claimed: float = 1.0) -> None:
        self.claimed = claimed
        self.keys: list[nn.Module] = [nn.Identity() for _ in range(self.blocks)]

    def block_costs(self) -> dict[nn.Module, BlockCost]:
        return {key: BlockCost(self.claimed, 1 / self.blocks) for key in self.keys}

    def read(self, policy: Policy, size: int, samples: int) -> Reading:
        again = self.blocks if policy.recomputed is None else len(policy.recomputed)
        bytes_each = {"keep": 10, "recompute": 10 - again, "offload": 1}[policy.name]
        return Reading(1000, 0, 0, 0, 1000 + bytes_each * size, 0, 0, 0, 0)


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (1240, "micro_batch_size=24 (activations: keep)"),
        # One block less would save a micro-batch: no reason to look at blocks.
        (1119, "micro_batch_size=8 (activations: keep)"),
        (1079, "micro_batch_size=8 (activations: recompute 1 of 8 blocks)"),
        (1035, "micro_batch_size=12 (activations: recompute)"),
        (1003, "micro_batch_size=3 (activations: offload)"),
        (1000, "None"),
    ],
)
def test_the_shortest_step_of_known_ones(budget: int, expected: str) -> None:
    peaks = PolicyPeaks(cast(FakeSteps, Known()), 24, "auto")
    assert str(peaks.best(budget)) == expected
    least = peaks.least()
    assert (str(least.policy), least.peak.device_bytes) == ("offload", 1001)


@pytest.mark.parametrize("claimed", [0.3, 1.0, 4.0])
@pytest.mark.parametrize(
    ("budget", "expected"),
    [(1060, "keep"), (1059, "recompute 1 of 8 blocks"), (1018, "recompute 7 of 8 blocks"),
     (1012, "recompute"), (1011, "offload"), (1000, "offload")],
)  # fmt: skip
def test_the_policy_for_a_known_size(budget: int, expected: str, claimed: float) -> None:
    """Whether blocks save what they seemed to, or less, or more."""
    peaks = PolicyPeaks(cast(FakeSteps, Known(claimed)), 24, "auto")
    assert str(peaks.best_at(6, budget).policy) == expected


class TestPlans:
    def test_none_is_made_on_a_cpu_without_a_budget(self, plans: list[int]) -> None:
        result = automatic_for(network(), None).backward(*batch())
        assert result.activations == "keep"
        assert plans == []

    def test_one_for_large_batches_of_as_many_samples(
        self, plans: list[int], peaks: dict[str, int]
    ) -> None:
        model = network()
        accumulator = automatic_for(model, peaks["recompute"] + 1000)
        policies = []
        for samples in (SAMPLES, SAMPLES, 12, SAMPLES, 12):
            policies.append(accumulator.backward(*batch(samples)).activations)
            model.zero_grad()
        assert plans == [SAMPLES, 12]
        assert policies[0] == policies[1] == policies[3]

    def test_a_stream_is_planned_at_its_first_item_and_keeps_to_that(
        self, plans: list[int], peaks: dict[str, int]
    ) -> None:
        model = network()
        oracle = full_batch(model, nn.CrossEntropyLoss(), *batch())
        inputs, targets = batch()
        sizes = (32, 4, 12)
        for size, expected in ((MICRO, [32]), ("auto", [32, 4, 12])):
            plans.clear()
            accumulator = automatic_for(model, (peaks["recompute"] + peaks["keep"]) // 2, size)
            items = zip(inputs.split(sizes), targets.split(sizes), strict=True)
            result = accumulator.backward(items)
            assert_gradients_match(gradients_of(model), oracle.gradients, STEP)
            assert result.activations == str(accumulator._activations.policy)
            assert plans == expected
            model.zero_grad()

    def test_an_empty_stream(self) -> None:
        with pytest.raises(ValueError, match="the stream of micro-batches is empty"):
            automatic_for(network(), 1 << 30).backward(iter([]))

    def test_the_choice_is_logged(
        self, peaks: dict[str, int], caplog: pytest.LogCaptureFixture
    ) -> None:
        with caplog.at_level("INFO", logger="sbp_fast"):
            automatic_for(network(), peaks["keep"] - 1).backward(*batch())
        expected = "a batch of 48: micro_batch_size=16 (activations: recompute 1 of 4 blocks)"
        assert expected in caplog.text


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The batch sizes for which plans have been made."""
    made: list[int] = []
    native = automatic.predict_peaks

    def noting(*arguments: Any, batch_size: int, **options: Any) -> Any:
        made.append(batch_size)
        return native(*arguments, batch_size=batch_size, **options)

    monkeypatch.setattr(automatic, "predict_peaks", noting)
    return made


def tied() -> nn.Module:
    model = network(4)
    model[2] = model[0]
    return model


def compiled() -> nn.Module:
    model = network()
    for block in model[:-1]:
        block.compile(backend="eager")
    return model


def compiled_by_function() -> nn.Module:
    model = network()
    for position in range(BLOCKS):
        model[position] = torch.compile(model[position], backend="eager")
    return model


def row_of_layers() -> nn.Module:
    layers = [layer for _ in range(9) for layer in (nn.Linear(WIDTH, WIDTH), nn.Tanh())]
    return nn.Sequential(*layers, nn.Linear(WIDTH, CLASSES)).double()


class Once(Block):
    """Cannot be computed again."""

    def forward(self, x: Tensor) -> Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        return super().forward(x.tanh() if self.calls % 2 else x)


class TestModels:
    @pytest.mark.parametrize(
        ("build", "expected"),
        [
            (tied, "recompute [12] of 3 blocks"),
            (compiled, "recompute [1-3] of 4 blocks"),
            (compiled_by_function, "recompute [1-3] of 4 blocks"),
            (row_of_layers, "recompute [1-3] of 4 blocks"),
        ],
        ids=lambda value: getattr(value, "__name__", ""),
    )
    def test_blocks_of_all_kinds(self, build: Callable[[], nn.Module], expected: str) -> None:
        model = build()
        oracle = full_batch(model, nn.CrossEntropyLoss(), *batch())
        kept, least = (peak_under(Policy(name), model=model) for name in ("keep", "recompute"))
        result = automatic_for(model, (kept + least) // 2).backward(*batch())
        assert re.fullmatch(expected, result.activations)
        assert result.micro_batch_size == MICRO
        assert_gradients_match(gradients_of(model), oracle.gradients, STEP)

    def test_a_model_that_is_compiled_as_a_whole_is_offloaded(self, peaks: dict[str, int]) -> None:
        model = network()
        model.compile(backend="eager")
        result = automatic_for(model, (peaks["keep"] + peaks["recompute"]) // 2).backward(*batch())
        assert result.activations == "offload"

    def test_blocks_that_cannot_be_computed_again_are_offloaded(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        kept = peak_under(Policy("keep"), model=network(kind=Once))
        with caplog.at_level("INFO", logger="sbp_fast"):
            result = automatic_for(network(kind=Once), kept - 1000).backward(*batch())
        assert result.activations == "offload"
        assert "no block is computed again: CheckpointError" in caplog.text

    @pytest.mark.filterwarnings("ignore:.*batch norm layers:UserWarning")
    @pytest.mark.parametrize(
        ("build", "options"),
        [
            (convolutional.residual, {}),
            (convolutional.residual, {"batch_norm": "micro_batch"}),
            (dropout_layers.elements, {}),
            (language.gpt_dropout, {}),
            (language.gpt_dropout, {"dropout": "native"}),
            (contrastive.info_nce, {"cross_sample_loss": True}),
        ],
        ids=lambda value: getattr(value, "__name__", str(value)),
    )
    def test_as_kept(self, build: Builder, options: dict[str, Any]) -> None:
        """Batch norm, dropout and losses over all samples, with less memory than keeping takes."""
        kept = build().to(torch.float64)
        torch.manual_seed(1)
        with memory_budget("cpu", None) as memory:
            memory.track([*kept.model.parameters(), *kept.model.buffers()])
            accumulator = accumulator_for(kept, UNEVEN, activations="keep", **options)
            peak = accumulator.backward(kept.inputs, kept.targets).peak_bytes
        assert peak is not None
        case = build().to(torch.float64)
        torch.manual_seed(1)
        accumulator = accumulator_for(case, UNEVEN, memory_budget=round(0.97 * peak), **options)
        assert isinstance(accumulator._activations, Automatic)
        result = accumulator.backward(case.inputs, case.targets)
        assert result.peak_bytes is not None
        assert result.peak_bytes <= 0.97 * peak
        assert_gradients_match(all_gradients(case), all_gradients(kept), STEP)
        assert_buffers_match(buffers_of(case.model), buffers_of(kept.model), STEP)


@settings(max_examples=12)
@given(
    blocks=st.integers(1, 4),
    size=st.one_of(st.just("auto"), st.integers(3, 20)),
    samples=st.integers(8, 40),
    part=st.floats(0.05, 0.7),
)
def test_random_budgets_hold(blocks: int, size: Any, samples: int, part: float) -> None:
    """By count."""
    model = network(blocks)
    parameters = 8 * sum(parameter.numel() for parameter in model.parameters())
    kept = 8 * samples * WIDTH * 5 * blocks
    budget = 2 * parameters + (8 << 10) + round(part * kept)
    oracle = full_batch(model, nn.CrossEntropyLoss(), *batch(samples))
    try:
        result = automatic_for(model, budget, size).backward(*batch(samples))
    except (BudgetError, NothingSmallerError) as error:
        words = re.search(r"would do is (\d+) bytes", str(error))
        assert words is not None
        assert int(words[1]) > budget
        return
    assert result.peak_bytes is not None
    assert result.peak_bytes <= budget
    assert_gradients_match(gradients_of(model), oracle.gradients, STEP)


@pytest.fixture(scope="module")
def planned() -> Any:
    budget = peak_under(Policy("keep"), 2)
    return plan(
        network(),
        nn.CrossEntropyLoss(),
        batch(2),
        batch_size=SAMPLES,
        budget=budget,
        device="cpu",
        optimizer=torch.optim.SGD,
        activations="auto",
    )


class TestPlan:
    def test_is_what_a_step_does(self, planned: Any) -> None:
        result = automatic_for(network(), planned.budget, "auto").backward(*batch())
        assert (result.activations, result.micro_batch_size) == (
            planned.policy,
            planned.micro_batch_size,
        )
        expected = pytest.approx(result.peak_bytes, rel=tolerances.PLANNED_PEAK["cpu"])
        assert planned.chosen.peak.device_bytes == expected

    def test_rows_of_every_policy(self, planned: Any) -> None:
        policies = list(dict.fromkeys(row.policy for row in planned.rows))
        assert policies == ["keep", "recompute", "offload", planned.policy]
        assert re.fullmatch("recompute [1-3] of 4 blocks", planned.policy)
        (marked,) = [line for line in str(planned).splitlines() if line.endswith("<-")]
        assert marked.startswith(planned.policy)
        for row in planned.rows:
            if row.policy in ("keep", "recompute") and SAMPLES % row.micro_batch_size == 0:
                counted = peak_under(Policy(row.policy), row.micro_batch_size)
                expected = pytest.approx(counted, rel=tolerances.PLANNED_PEAK["cpu"])
                assert row.peak.device_bytes == expected

    def test_figure_has_a_line_for_each(self, planned: Any, tmp_path: Path) -> None:
        planned.save_plot(tmp_path / "plan.svg")
        drawn = (tmp_path / "plan.svg").read_text()
        for label in ("keep", "recompute", "offload", "budget", "chosen"):
            assert f"<!-- {label} -->" in drawn

    def test_command(
        self,
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        (tmp_path / "automatic_subject.py").write_text(
            "import torch\nfrom torch import nn\n"
            "def small():\n"
            "    model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 4))\n"
            "    return model, nn.CrossEntropyLoss(), torch.randn(12, 6), torch.randint(4, (12,))\n"
        )
        monkeypatch.chdir(tmp_path)
        line = "automatic_subject:small --device cpu --budget 1MiB --activations auto"
        assert main(["plan", *line.split()]) == 0
        printed = capsys.readouterr().out
        assert "activations='keep'" in printed
        assert "\noffload " in printed

    def test_policies_that_are_none(self) -> None:
        with pytest.raises(ValueError, match="activations is 'some'; it must be one of 'auto'"):
            plan(
                network(),
                nn.CrossEntropyLoss(),
                batch(2),
                batch_size=4,
                budget="1MiB",
                device="cpu",
                activations="some",
            )


def test_all_of_a_models_blocks_have_keys_that_are_its_own() -> None:
    for model in (network(), row_of_layers(), tied()):
        blocks = find_blocks(model)
        assert set(blocks.keys) <= set(model.modules())
        twin = copy.deepcopy(model)
        copies = dict(zip(model.modules(), twin.modules(), strict=True))
        again = blocks.in_copy(copies)
        assert again.keys == [copies[key] for key in blocks.keys]
        assert again.keys == find_blocks(twin).keys
