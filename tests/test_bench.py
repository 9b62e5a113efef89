"""The benchmarks compute what they say and write what they promise. How fast they are is not asserted."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch

from sbp_fast import ops
from sbp_fast.bench import (
    activation_policies,
    alternatives,
    attention_models,
    batch_norm,
    cli,
    dropout,
    environment,
    exact,
    goals,
    growth,
    kernels,
    plots,
    rivals,
    step,
)
from sbp_fast.bench.case import Case, Contender
from sbp_fast.bench.image_sizes import StepSize
from sbp_fast.bench.models import UNet, resnet18, resnet50
from sbp_fast.bench.rows import COLUMNS, RATIO_KINDS, Row, as_table, read_csv, write_csv
from sbp_fast.bench.shapes import resnet50_shapes
from sbp_fast.bench.stream_ceiling import FLOATS_MOVED, Ceilings
from sbp_fast.bench.streaming import StreamSize
from sbp_fast.bench.tensor_lists import TensorSets, make_set, make_sets
from sbp_fast.bench.timing import Spread, measure, stopwatch_for
from sbp_fast.bench.weight_gradients import LayerSize, NetworkSize
from sbp_fast.bench.workloads import NETWORKS, Workload, make_problem

CPU = torch.device("cpu")
SHAPES = [(3, 5), (7,), (2, 3, 2, 2)]
TINY_PLAN = cli.Plan(
    networks=1,
    ceiling_elements=64,
    kernel_rounds=2,
    step_rounds=2,
    activations=[(2, 3, 4, 5)],
    workloads=[Workload("ResNet-18", torch.float32, 4, 2)],
    alternatives=[Workload("MLP", torch.float32, 4, 2)],
    compiled=(),
    growth=[Workload("GPT", torch.float32, batch, 2) for batch in (2, 6)],
    growth_rounds=2,
    exact_sizes=[StepSize(pixels=32, batch=4, micro_batch=2)],
    exact_rounds=2,
    policy_sizes=[StepSize(pixels=32, batch=4, micro_batch=2)],
    policy_rounds=2,
    layer_sizes=[LayerSize(5, 7, 3), LayerSize(5, 7, 3, pixels=2)],
    network_sizes=[NetworkSize(8, 4, 2), NetworkSize(8, 4, 2, blocks=1)],
    stream_sizes=[StreamSize(rows=16, row_bytes=64, batch=6, micro_batch=4, hidden=8)],
)


@pytest.fixture
def _one_network(monkeypatch) -> None:
    """Of those whose activations are recomputed and offloaded; all of it is small."""
    monkeypatch.setattr(activation_policies, "networks", lambda: ["U-Net"])
    monkeypatch.setattr("sbp_fast.activations.offload._SMALLEST_BYTES", 64)


class FakeClock:
    """Runs what it is given and hands out times from a list per contender."""

    def __init__(self, times: dict[str, list[float]]) -> None:
        self.times = {name: iter(values) for name, values in times.items()}
        self.ran = ""

    def contender(self, name: str):
        def call(_: int) -> None:
            self.ran = name

        return call

    def __call__(self, function) -> float:
        function()
        return next(self.times[self.ran])


def make_row(**changes) -> Row:
    row = Row(
        benchmark="accumulate", case="bf16", contender="sbp_fast cpu", device="a processor",
        dtype="bfloat16", tensors=3, elements=46, bytes=460, threads=2, rounds=3, median_ms=0.25,
        min_ms=0.2, max_ms=0.5, iqr_ms=0.1, gb_per_s=1.84, us_per_tensor=83.3, ratio_to="torch",
        ratio_kind="speedup", ratio_median=4.0, ratio_min=3.5, ratio_max=4.5, revision="abc1234",
        date="2025-01-01T00:00:00+00:00",
    )  # fmt: skip
    return dataclasses.replace(row, **changes)


# Timing


def test_spread_of_known_values():
    spread = Spread((4.0, 1.0, 2.0, 3.0, 100.0))
    assert (spread.median, spread.minimum, spread.maximum) == (3.0, 1.0, 100.0)
    assert spread.interquartile_range == 2.0
    assert Spread((5.0,)).interquartile_range == 0.0


def test_ratio_is_taken_round_by_round():
    # Both slow down threefold in the second round: the ratio does not notice.
    assert Spread((2.0, 6.0)).over(Spread((1.0, 3.0))).values == (2.0, 2.0)
    with pytest.raises(ValueError, match="2 rounds cannot be divided by 1"):
        Spread((1.0, 2.0)).over(Spread((1.0,)))


def test_measure_takes_turns_and_forgets_the_warm_up():
    order: list[str] = []
    clock = iter(range(1, 100))

    def stopwatch(function) -> float:
        function()
        return float(next(clock))

    contenders = {name: (lambda _, name=name: order.append(name)) for name in "ab"}
    spreads = measure(contenders, stopwatch, rounds=3, warm_up=1)
    assert order == ["b", "a", "a", "b", "b", "a", "a", "b"]
    assert spreads["a"].values == (3.0, 6.0, 7.0)
    assert spreads["b"].values == (4.0, 5.0, 8.0)


def test_measure_divides_by_the_calls_and_counts_them():
    seen: list[int] = []
    spreads = measure({"a": seen.append}, lambda function: (function(), 10.0)[1], rounds=2, calls=5)
    assert spreads["a"].values == (2.0, 2.0)
    assert seen == list(range(15))  # with one round of warm-up


@pytest.mark.parametrize(
    ("contenders", "rounds", "calls"), [({}, 1, 1), ({"a": print}, 0, 1), ({"a": print}, 1, 0)]
)
def test_measure_refuses_to_measure_nothing(contenders, rounds, calls):
    with pytest.raises(ValueError, match="at least one of each"):
        measure(contenders, lambda function: 1.0, rounds=rounds, calls=calls)


class FakeCuda:
    """Stands for torch.cuda and notes what happens in which order."""

    def __init__(self, *, sleeps_long_enough: bool) -> None:
        self.seen: list[str] = []
        self.sleeps_long_enough = sleeps_long_enough
        self.events = iter(["start", "end"])

    def synchronize(self) -> None:
        self.seen.append("synchronize")

    def _sleep(self, cycles: int) -> None:
        assert cycles > 0
        self.seen.append("sleep")

    def Event(self, *, enable_timing: bool):  # noqa: N802 (torch's name)
        assert enable_timing
        name = next(self.events)
        return SimpleNamespace(
            record=lambda: self.seen.append(name),
            query=lambda: not self.sleeps_long_enough,
            synchronize=lambda: self.seen.append(f"wait for {name}"),
            elapsed_time=lambda end: 2.5,
        )


def test_kernels_are_queued_behind_a_sleep_and_other_calls_are_not(monkeypatch):
    def take_time(*, host_counts: bool, sleeps_long_enough: bool = True) -> list[str]:
        cuda = FakeCuda(sleeps_long_enough=sleeps_long_enough)
        monkeypatch.setattr(torch, "cuda", cuda)
        stopwatch = stopwatch_for(torch.device("cuda"), host_counts=host_counts)
        assert stopwatch(lambda: cuda.seen.append("work")) == 2.5
        return cuda.seen

    work = ["start", "work", "end", "wait for end"]
    assert take_time(host_counts=True) == ["synchronize", *work]
    assert take_time(host_counts=False) == ["synchronize", "sleep", *work]
    with pytest.warns(UserWarning, match="waited for the host"):
        take_time(host_counts=False, sleeps_long_enough=False)


# Cases and rows


def test_ratios_of_every_kind_from_fake_times():
    clock = FakeClock({"ours": [9.0, 2.0, 4.0, 8.0], "theirs": [9.0, 4.0, 12.0, 8.0]})
    opponents = {"theirs": "speedup"}
    case = Case(
        "accumulate", "a case", torch.bfloat16, tensors=4, elements=10, bytes=4_000_000,
        contenders=[
            Contender("ours", clock.contender("ours"), opponents),
            Contender("theirs", clock.contender("theirs"), {"ours": "time"}, bytes=8_000_000),
        ],
    )  # fmt: skip
    ours, theirs = case.measure(CPU, rounds=3, stopwatch=clock)
    assert (ours.median_ms, ours.min_ms, ours.max_ms) == (4.0, 2.0, 8.0)
    assert (ours.ratio_median, ours.ratio_min, ours.ratio_max) == (2.0, 1.0, 3.0)
    assert (ours.gb_per_s, ours.us_per_tensor) == (1.0, 1000.0)
    assert (ours.ratio_to, ours.ratio_kind, ours.dtype) == ("theirs", "speedup", "bfloat16")
    assert (theirs.ratio_median, theirs.gb_per_s) == (2.0, 1.0)

    clock = FakeClock({"ours": [9.0, 2.0], "ceiling": [9.0, 4.0]})
    case = dataclasses.replace(
        case,
        contenders=[
            Contender("ours", clock.contender("ours"), {"ceiling": "bandwidth"}),
            Contender("ceiling", clock.contender("ceiling"), bytes=16_000_000),
        ],
    )
    ours, ceiling = case.measure(CPU, rounds=1, stopwatch=clock)
    assert ours.ratio_median == pytest.approx((4 / 2) / (16 / 4))
    assert (ceiling.ratio_median, ceiling.ratio_to) == (None, "")


def test_an_unknown_kind_of_ratio_is_named():
    contenders = [Contender("a", lambda _: None, {"b": "distance"}), Contender("b", lambda _: None)]
    case = Case("x", "x", torch.float32, 1, 1, 1, contenders)
    with pytest.raises(ValueError, match="'distance'"):
        case.measure(CPU, rounds=1)


def test_csv_round_trip(tmp_path):
    rows = [make_row(), make_row(ratio_to="", ratio_kind="", ratio_median=None, ratio_min=None,
                                 ratio_max=None)]  # fmt: skip
    write_csv(tmp_path / "rows.csv", rows)
    assert read_csv(tmp_path / "rows.csv") == rows
    assert (tmp_path / "rows.csv").read_text().splitlines()[0] == ",".join(COLUMNS)


def test_csv_of_other_columns_is_refused(tmp_path):
    (tmp_path / "rows.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="measure again"):
        read_csv(tmp_path / "rows.csv")


def test_table_has_one_line_per_contender():
    rows = [make_row(), make_row(ratio_to="ceiling", ratio_kind="bandwidth", ratio_median=0.9)]
    lines = as_table(rows).splitlines()
    assert len(lines) == 2
    assert lines[1].endswith("4.000 speedup to torch, 0.900 bandwidth to ceiling")


# The contenders compute the same


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_all_rivals_accumulate_the_same(dtype):
    sets = make_sets(SHAPES, dtype, CPU)
    starts = [tensor.clone() for tensor in sets[0].accumulators]
    flat_start = sets[0].flat[0].clone()
    expected = [
        a + rivals.SCALE * g.float() for a, g in zip(starts, sets[0].gradients, strict=True)
    ]
    statistics = ops.new_statistics()
    calls = {
        "ours": rivals.ours_accumulate(sets, "auto", statistics=statistics),
        "foreach": rivals.foreach_add(sets),
        "per tensor": rivals.add_per_tensor(sets),
        "numpy": rivals.numpy_add(sets),
    }
    for name, call in calls.items():
        for tensor, start in zip(sets[0].accumulators, starts, strict=True):
            tensor.copy_(start)
        call(0)
        torch.testing.assert_close(sets[0].accumulators, expected, msg=name)
    rivals.add_flat(sets)(0)
    gradients = torch.cat([gradient.flatten() for gradient in sets[0].gradients]).float()
    torch.testing.assert_close(sets[0].flat[0], flat_start + rivals.SCALE * gradients)


def test_all_rivals_write_first_the_same():
    sets = make_sets(SHAPES, torch.bfloat16, CPU)
    expected = [rivals.SCALE * gradient.float() for gradient in sets[0].gradients]
    statistics = ops.new_statistics()
    for call in (
        rivals.ours_accumulate(sets, "auto", statistics=statistics, first_write=True),
        rivals.ours_zero_and_add(sets, "auto", statistics),
        rivals.foreach_zero_and_add(sets),
    ):
        for tensor in sets[0].accumulators:
            tensor.fill_(7.0)
        call(0)
        torch.testing.assert_close(sets[0].accumulators, expected)


def test_all_rivals_finalise_the_same():
    sets = TensorSets([make_set(SHAPES, torch.bfloat16, CPU)])
    starts = [tensor.clone() for tensor in sets[0].accumulators]
    # Scale 0.5 and norm 2 against a bound of 1 make a factor of a quarter; torch's is a half.
    rivals.ours_finalise(sets, "auto")(0)
    expected = [(0.25 * start).bfloat16() for start in starts]
    torch.testing.assert_close(sets[0].gradients, expected)
    call = rivals.foreach_mul_and_copy(sets)
    call(0)
    torch.testing.assert_close(sets[0].gradients, [(0.5 * start).bfloat16() for start in starts])
    call(1)
    torch.testing.assert_close(sets[0].accumulators, starts)


def test_statistics_rivals_run_and_agree_on_the_norm():
    sets = make_sets(SHAPES, torch.float32, CPU)
    rivals.ours_statistics(sets, "auto")(0)
    assert bool(rivals.foreach_norm(sets)(0))
    sets[0].gradients[1][2] = float("inf")
    assert not bool(rivals.foreach_norm(sets)(0))


def test_all_rivals_normalise_the_same():
    cases = [make() for make in batch_norm.cases([(2, 3, 4, 5)], CPU)]
    assert len({case.name for case in cases}) == 2 * 2 * 2
    for case in cases:
        ours, theirs = (contender.call(0) for contender in case.contenders)
        tolerance = 1e-5 if case.dtype is torch.float32 else 2**-7
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance, msg=case.name)


def test_all_rivals_drop_as_much():
    for make in dropout.cases([(4, 5, 60, 50)], CPU):
        case = make()
        for contender in case.contenders:
            dropped = contender.call(0) == 0
            assert float(dropped.float().mean()) == pytest.approx(0.1, abs=0.01), contender.name


def test_resnet50_shapes_are_those_of_the_paper():
    shapes = resnet50_shapes()
    assert len(shapes) == 161
    assert sum(torch.Size(shape).numel() for shape in shapes) == 25_557_032


def test_resnet50_has_its_parameters_and_norms():
    model = resnet50(classes=1000)
    assert sum(parameter.numel() for parameter in model.parameters()) == 25_557_032
    assert sum(isinstance(layer, torch.nn.BatchNorm2d) for layer in model.modules()) == 53
    assert resnet50(width=4)(torch.randn(2, 3, 64, 64)).shape == (2, 10)


def test_unet_has_its_parameters_and_logits() -> None:
    parameters = sum(parameter.numel() for parameter in UNet(classes=2).parameters())
    assert parameters == 31_037_698
    assert UNet(width=2)(torch.randn(1, 3, 32, 48)).shape == (1, 10, 32, 48)


def test_all_policies_leave_the_same_parameters() -> None:
    size, results = StepSize(pixels=16, batch=4, micro_batch=2), {}
    for name, make in activation_policies._CONTENDERS.items():
        model, inputs, targets = activation_policies._problem("U-Net", size, CPU, width=4)
        make(model, inputs, targets, size.micro_batch)(0)
        results[name] = torch.cat([parameter.flatten() for parameter in model.parameters()])
    for name, parameters in results.items():
        torch.testing.assert_close(parameters, results[step.PLAIN], msg=name)


def test_all_networks_have_a_problem() -> None:
    size = StepSize(pixels=32, batch=3, micro_batch=2)
    for network in activation_policies.networks():
        model, inputs, targets = activation_policies._problem(network, size, CPU, width=4)
        assert torch.nn.functional.cross_entropy(model(inputs), targets).isfinite(), network
        assert len(activation_policies.find_blocks(model).whole) >= 9, network


def test_resnet18_has_its_parameters_and_logits():
    assert sum(parameter.numel() for parameter in resnet18(classes=1000).parameters()) == 11_689_512
    assert resnet18(width=4)(torch.randn(1, 3, 32, 32)).shape == (1, 10)


@pytest.mark.parametrize("micro_batch", [1, 3, 4])
def test_both_steps_leave_the_same_parameters(micro_batch):
    inputs, targets = torch.randn(4, 3, 32, 32), torch.randint(0, 10, (4,))
    models = []
    for make_step in (step.plain_step, step.streamed_step):
        torch.manual_seed(1)
        models.append(resnet18(width=4))
        call = make_step(models[-1], inputs, targets, micro_batch)
        call(0)
        call(1)
    before = dict(resnet18(width=4).named_parameters())
    for (name, plain), streamed in zip(
        models[0].named_parameters(), models[1].parameters(), strict=True
    ):
        torch.testing.assert_close(streamed, plain, msg=name)
        assert plain.grad is None
        assert streamed.grad is None
    assert any(not torch.equal(before[name], plain) for name, plain in models[0].named_parameters())


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_all_workloads_can_be_trained(network: str, dtype: torch.dtype) -> None:
    model, inputs, targets = make_problem(Workload(network, dtype, 3, 2), CPU, width=4)
    outputs = model(inputs)
    assert outputs.dtype == dtype
    torch.nn.functional.cross_entropy(outputs, targets).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_attention_models_have_their_parameters() -> None:
    # 12 d^2 + 13 d per layer, the last norm, and what is outside: patches, positions, head.
    layers = 12 * (12 * 384**2 + 13 * 384) + 2 * 384
    vit = attention_models.ViT(hidden=384, depth=12, pixels=224, patch=16, classes=1000)
    outside = (3 * 16 * 16 + 1) * 384 + 196 * 384 + 385 * 1000
    assert sum(parameter.numel() for parameter in vit.parameters()) == layers + outside
    gpt = attention_models.GPT(hidden=384, depth=12, length=16, vocabulary=50)
    assert sum(parameter.numel() for parameter in gpt.parameters()) == layers + 66 * 384


def test_gpt_does_not_see_what_comes() -> None:
    gpt = attention_models.GPT(hidden=8, depth=2, length=6, vocabulary=5).double()
    tokens = torch.randint(0, 5, (2, 6))
    changed = tokens.clone()
    changed[:, 4:] = (tokens[:, 4:] + 1) % 5
    torch.testing.assert_close(gpt(tokens)[..., :4], gpt(changed)[..., :4])
    assert not torch.allclose(gpt(tokens)[..., 4:], gpt(changed)[..., 4:])


@pytest.mark.parametrize("rival", [alternatives.ACCELERATE, alternatives.FABRIC])
def test_alternatives_leave_the_same_parameters(rival: str) -> None:
    rivals = alternatives.contenders(compiled=False)
    if rival not in rivals:
        pytest.skip(f"{rival} is not installed")
    results = []
    for name in (rival, step.PLAIN, step.OURS):
        model, inputs, targets = make_problem(Workload("MLP", torch.float32, 4, 2), CPU, width=2)
        call = rivals[name](model, inputs, targets, 2)
        call(0)
        call(1)
        results.append(torch.cat([parameter.flatten() for parameter in model.parameters()]))
    torch.testing.assert_close(results[0], results[1])
    torch.testing.assert_close(results[2], results[1])


def test_compiled_contenders_compute_the_same() -> None:
    workload = Workload("MLP", torch.float32, 4, 2)
    case = alternatives.make_case(workload, CPU, width=1, compiled=True)
    compiled = [c for c in case.contenders if "torch.compile" in c.name]
    assert [c.name for c in compiled] == [
        alternatives.COMPILED.format(step.OURS), alternatives.COMPILED.format(step.PLAIN),
    ]  # fmt: skip
    assert compiled[0].opponents == {compiled[1].name: "time"}


# The ceiling


@pytest.mark.skipif(not ops.availability("cpu").usable, reason=ops.availability("cpu").reason)
def test_stream_kernels_compute_what_stream_defines():
    elements = 2 * 65536 + 48  # more than one piece, and a shorter last one
    kernel = torch.ops.sbp_fast._stream_kernel.default
    a, b, c = (torch.randn(elements) for _ in range(3))
    expected = {
        "copy": b, "scale": 0.5 * b, "add": b + c, "triad": b + 0.5 * c, "update": a + 0.5 * b,
        "read": a,
    }  # fmt: skip
    assert set(expected) == set(FLOATS_MOVED)
    for name, result in expected.items():
        target = a.clone()
        kernel(target, b, c, 0.5, name)
        torch.testing.assert_close(target, result, rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.skipif(not ops.availability("cpu").usable, reason=ops.availability("cpu").reason)
def test_stream_kernels_refuse_what_they_cannot_walk():
    kernel = torch.ops.sbp_fast._stream_kernel.default
    a = torch.zeros(64)
    with pytest.raises(RuntimeError, match="'square'"):
        kernel(a, a, a, 1.0, "square")
    with pytest.raises(RuntimeError, match=r"b is a torch\.float64 tensor of 64 elements"):
        kernel(a, a.double(), a, 1.0, "copy")
    with pytest.raises(RuntimeError, match=r"c is a torch\.float32 tensor of 48 elements"):
        kernel(a, a, a[:48], 1.0, "copy")


@pytest.mark.parametrize("native", [True, False])
def test_there_is_a_ceiling_for_every_kernel(monkeypatch, native):
    if not native:
        unusable = lambda name: ops.native.Availability(False, "left out")  # noqa: E731
        monkeypatch.setattr("sbp_fast.bench.stream_ceiling.availability", unusable)
    ceilings = Ceilings(CPU, 100)
    for kernel in FLOATS_MOVED:
        ceiling = ceilings.like(kernel)
        ceiling.call(0)
        assert ceiling.bytes % (96 * 4) == 0
        if not native:
            assert ceiling.name.startswith("torch ")
    names = [ceiling.name for ceiling in ceilings.all()]
    assert len(set(names)) == len(names)


# The whole


@pytest.mark.usefixtures("_one_network")
def test_bench_writes_rows_plots_and_environment(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "resnet50_shapes", lambda: SHAPES)
    monkeypatch.setattr(kernels, "_OVERHEAD_CALLS", 1)
    rows = cli.bench(CPU, TINY_PLAN, tmp_path, step_width=4)
    # The files keep six digits.
    subjects = [subject for subject in cli.SUBJECTS if subject != "growth"]
    written = [row for name in subjects for row in read_csv(tmp_path / f"{name}.csv")]
    assert [(row.case, row.contender, row.ratio_to) for row in written] == [
        (row.case, row.contender, row.ratio_to) for row in rows
    ]
    for row in rows:
        assert 0 < row.min_ms <= row.median_ms <= row.max_ms
        assert row.rounds == 2
        assert row.elements > 0
        assert (row.ratio_to == "") == (row.ratio_kind == "") == (row.ratio_median is None)
        assert row.ratio_kind in ("", *RATIO_KINDS)
    benchmarks = {
        "ceiling", "accumulate", "first write", "statistics", "finalise", "overhead", "step",
        "batch norm", "dropout", "alternatives", "exact", "activations", "weight gradients",
        "weight gradients, step", "streaming",
    }  # fmt: skip
    assert {row.benchmark for row in rows} == benchmarks
    for subject in cli.SUBJECTS:
        described = json.loads((tmp_path / f"{subject}_environment.json").read_text())
        assert described["torch"] == torch.__version__
        assert described["processor"]
    with (tmp_path / "exact_memory.csv").open() as file:
        memory = list(csv.DictReader(file))
    assert [row["contender"] for row in memory] == [exact.EXACT, step.PLAIN]
    assert int(memory[0]["host_bytes"]) > 0
    assert int(memory[1]["host_bytes"]) == 0
    assert float(memory[0]["device_ratio"]) < 1.5
    with (tmp_path / "activations_memory.csv").open() as file:
        memory = list(csv.DictReader(file))
    for row in memory:
        assert (int(row["host_bytes"]) > 0) == ("offload" in row["contender"])
        assert float(row["device_ratio"]) < 1.05 or "save_on_cpu" in row["contender"]
    with (tmp_path / "growth.csv").open() as file:
        grown = list(csv.DictReader(file))
    assert [row["batch"] for row in grown] == ["2", "6"]
    assert float(grown[0]["ratio_to_smallest"]) == 1.0
    assert all(float(row["ms_per_sample"]) > 0 for row in grown)
    assert int(grown[1]["device_bytes"]) < 1.2 * int(grown[0]["device_bytes"])
    with (tmp_path / "growth_overhead.csv").open() as file:
        assert [row["contender"] for row in csv.DictReader(file)] == [step.OURS, step.PLAIN]
    printed = capsys.readouterr().out
    assert "step: at most 1.02 times the plain loop" in printed
    assert "step: at most" in (tmp_path / "step_goals.txt").read_text()
    if ops.availability("cpu").usable:  # the goals of the kernels are those of the native ones
        assert "step: at most" not in (tmp_path / "kernels_goals.txt").read_text()


@pytest.mark.usefixtures("_one_network")
@pytest.mark.parametrize("subject", cli.SUBJECTS)
def test_one_subject_leaves_the_files_of_the_other_alone(tmp_path, monkeypatch, subject):
    monkeypatch.setattr(cli, "resnet50_shapes", lambda: SHAPES)
    monkeypatch.setattr(kernels, "_OVERHEAD_CALLS", 1)
    cli.bench(CPU, TINY_PLAN, tmp_path, (subject,), step_width=4)
    assert (tmp_path / f"{subject}.csv").exists()
    assert all(path.name.startswith(subject) for path in tmp_path.iterdir())


def test_plots_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    kernel_rows = [make_row(), make_row(contender="torch"), make_row(case="fp32")]
    plots.draw_bandwidth(kernel_rows, tmp_path / "kernels.png")
    step_rows = [
        make_row(
            benchmark="step",
            contender=step.OURS,
            case=Workload("MLP", torch.float32, 16, size).name,
        )
        for size in (1, 4, 16)
    ]
    plots.draw_step(step_rows, tmp_path / "step.png")
    grown = [growth.Growth("MLP, micro-batch 2", batch, 2, 1.5, 1.0, 3 << 20) for batch in (2, 8)]
    plots.draw_growth(grown, tmp_path / "growth.png")
    for name in ("kernels.png", "step.png", "growth.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no row compares"):
        plots.draw_step(kernel_rows, tmp_path / "nothing.png")
    with pytest.raises(ValueError, match="no row counts bytes"):
        plots.draw_bandwidth([make_row(bytes=0)], tmp_path / "nothing.png")


def test_without_matplotlib_the_cure_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(plots.PlottingUnavailableError, match="pip install"):
        plots.draw_bandwidth([make_row()], tmp_path / "kernels.png")


def test_goals_on_average_take_the_geometric_mean():
    goal = goals.Goal("text", "step", at_most=1.0, on_average=True)
    rows = [make_row(benchmark="step", ratio_median=ratio) for ratio in (0.5, 2.0, 0.8)]
    assert goal.value(rows) == pytest.approx(0.8 ** (1 / 3))


def test_goals_take_the_worst_row():
    goal = goals.Goal("at least 4", "accumulate", at_least=4.0)
    assert goal.value([make_row(ratio_median=5.0), make_row(ratio_median=3.9)]) == 3.9
    assert not goal.is_met_by(3.9)
    assert goal.is_met_by(4.0)
    assert goal.value([make_row(benchmark="step")]) is None
    slow = make_row(benchmark="step", contender=step.OURS, ratio_to=step.PLAIN, ratio_median=1.03)
    assert goals.report([slow]).startswith("MISSED   1.030")
    assert goals.report([]) == ""


def test_arguments(tmp_path, monkeypatch, capsys):
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    taken = []
    monkeypatch.setattr(cli, "bench", lambda *arguments: taken.append(arguments))
    folder = tmp_path / "results"
    arguments = ["--device", "cpu", "--quick", "--only", "step", "--output", str(folder)]
    assert cli.run(parser.parse_args(arguments)) == 0
    assert taken == [(CPU, cli.QUICK, folder, ("step",))]
    assert cli.run(parser.parse_args(["--threads", "0"])) == 2
    assert "at least 1" in capsys.readouterr().out


def test_cuda_that_is_not_there_is_refused(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    assert cli.run(parser.parse_args(["--device", "cuda"])) == 2
    assert "torch sees no CUDA device" in capsys.readouterr().out


def test_slug_is_a_folder_name():
    name = environment.slug(CPU)
    assert name.startswith("cpu-")
    assert name.endswith("-threads")
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
