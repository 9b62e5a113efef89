"""The predicted peak is the one that is counted around real steps."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import tolerances
import torch
from torch import Tensor, nn
from torch.nn import functional
from zoo import convolutional, from_transformers, language
from zoo.case import SAMPLES, Builder, Case

from sbp_fast import StreamedAccumulator
from sbp_fast.memory import memory_budget
from sbp_fast.planning import Peak, PeakModel, predict_peak
from sbp_fast.planning.peak import Reading

MakeOptimizer = Callable[..., torch.optim.Optimizer]


def counted(
    case: Case, micro_batch_size: int, make_optimizer: MakeOptimizer, **options: Any
) -> tuple[int, int]:
    """Of a second step, on the device and on the host, when all that is kept between steps is there."""
    model = copy.deepcopy(case.model)
    accumulator = StreamedAccumulator(
        model,
        make_optimizer(model.parameters()),
        case.loss_fn,
        micro_batch_size=micro_batch_size,
        normalization=case.normalization,
        **options,
    )
    with memory_budget("cpu", None) as memory:
        memory.track(model.parameters())
        memory.track(model.buffers())
        accumulator.step(case.inputs, case.targets)
        memory.reset_peak()
        host_bytes = accumulator.step(case.inputs, case.targets).host_bytes
        return memory.peak_bytes, host_bytes


def predicted(
    case: Case, make_optimizer: MakeOptimizer, activations: str = "keep", **options: Any
) -> PeakModel:
    sample = case.inputs if case.loss_fn is None else (case.inputs, case.targets)
    return predict_peak(
        case.model,
        case.loss_fn,
        sample,
        batch_size=SAMPLES,
        device=torch.device("cpu"),
        optimizer=make_optimizer,
        policy=activations,
        **options,
    )


def assert_predicted(
    case: Case,
    make_optimizer: MakeOptimizer = torch.optim.AdamW,
    sizes: Sequence[int] = (2, SAMPLES),
    probe: bool = False,
    **options: Any,
) -> None:
    peaks = predicted(case, make_optimizer, **options)
    for size in sizes:
        peak = peaks.measure(size)
        device_bytes, host_bytes = counted(case, size, make_optimizer, probe=probe, **options)
        expected = pytest.approx(device_bytes, rel=tolerances.PLANNED_PEAK["cpu"])
        assert peak.device_bytes == expected, size
        assert peak.host_bytes == pytest.approx(host_bytes, rel=tolerances.PLANNED_PEAK["cpu"])


@pytest.mark.parametrize(
    ("build", "sizes"),
    [
        (from_transformers.resnet50, (8,)),
        (from_transformers.vit_dropout, (2,)),
        (convolutional.unet, (2,)),
        (convolutional.residual_channels_last, (5, SAMPLES)),
        (language.gpt_dropout, (2, SAMPLES)),
        (language.gpt_dropout_checkpointed, (5,)),
    ],
)
def test_the_peak_is_that_of_real_steps(build: Builder, sizes: Sequence[int]) -> None:
    assert_predicted(build(), sizes=sizes)


@pytest.mark.parametrize(
    "options",
    [
        {"autocast": torch.bfloat16},
        {"backend": "reference"},
        {"make_optimizer": torch.optim.SGD},
        {"activations": "recompute"},
        {"activations": "offload"},
    ],
    ids=str,
)
def test_options_count(options: dict[str, Any]) -> None:
    assert_predicted(language.gpt_dropout(), **options)


def test_batch_norm_by_micro_batch() -> None:
    case = convolutional.residual()
    with pytest.warns(UserWarning, match="batch norm layers"):
        assert_predicted(case, sizes=(2,), batch_norm="micro_batch")


@pytest.mark.parametrize("batch_norm", [False, True])
def test_a_loss_over_all_samples(batch_norm: bool) -> None:
    assert_predicted(contrastive(batch_norm), cross_sample_loss=True)


def contrastive(batch_norm: bool = False) -> Case:
    norm: nn.Module = nn.BatchNorm1d(64) if batch_norm else nn.LayerNorm(64)
    model = nn.Sequential(nn.Linear(16, 64), norm, nn.ReLU(), nn.Linear(64, 8))

    return Case(model, info_nce, torch.randn(SAMPLES, 16), torch.randn(SAMPLES, 8))


def info_nce(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(outputs @ targets.T, torch.arange(len(outputs)))


def test_a_matrix_of_all_samples_by_all_samples() -> None:
    samples = 600
    model = nn.Linear(4, 2)
    case = Case(model, info_nce, torch.randn(samples, 4), torch.randn(samples, 2))
    peaks = predict_peak(
        model,
        info_nce,
        (case.inputs[:1], case.targets[:1]),
        batch_size=samples,
        device=torch.device("cpu"),
        optimizer=torch.optim.SGD,
        policy="keep",
        cross_sample_loss=True,
    )
    device_bytes, _ = counted(case, 100, torch.optim.SGD, cross_sample_loss=True)
    assert device_bytes > 2 * samples**2 * 4
    expected = pytest.approx(device_bytes, rel=tolerances.PLANNED_PEAK["cpu"])
    assert peaks.measure(100).device_bytes == expected


class CallsBatchNorm(nn.Module):
    """Without a layer for it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 64), nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(functional.batch_norm(self.first(x), None, None, training=True).relu())


def test_batch_norm_without_a_layer() -> None:
    model = CallsBatchNorm()
    case = Case(
        model, nn.CrossEntropyLoss(), torch.randn(SAMPLES, 16), torch.randint(5, (SAMPLES,))
    )
    assert predicted(case, torch.optim.SGD).measure(4).host_bytes > 0
    # The real step looks for it with the samples that the probe computes.
    assert_predicted(case, sizes=(4,), probe=True)


def test_parameters_in_16_bits_have_sums_in_32() -> None:
    case = language.gpt().to(torch.bfloat16)
    assert_predicted(case, sizes=(2,))
    parts = predicted(case, torch.optim.SGD).measure(2)
    assert parts.gradients == 2 * sum(parameter.nbytes for parameter in case.model.parameters())


def test_parts_are_what_they_say() -> None:
    width = 128
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(4)))
    case = Case(model, nn.MSELoss(), torch.randn(SAMPLES, width), torch.randn(SAMPLES, width))
    weights = 4 * width * width * 4
    peak = predicted(case, torch.optim.AdamW).measure(3)
    assert peak.parameters == weights
    assert peak.gradients == weights
    # Two moments for each weight; the number of steps is the host's.
    assert peak.optimizer == 2 * weights
    assert peak.device_bytes == (
        peak.parameters + peak.gradients + peak.optimizer + peak.activations + peak.transient
    )
    # Outputs of four layers, the loss's of one, a few numbers; inputs and targets are the host's.
    row = 3 * width * 4
    assert 4 * row <= peak.activations <= 6 * row
    assert predicted(case, torch.optim.SGD).measure(3).optimizer == 0


def on(device: str, width: int, optimizer: MakeOptimizer = torch.optim.AdamW) -> Peak:
    """Of eight layers without biases, on 16 of 64 samples."""
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(8)))
        sample = torch.zeros(1, width)
    peaks = predict_peak(
        model,
        nn.MSELoss(),
        (sample, sample),
        batch_size=64,
        device=torch.device(device),
        optimizer=optimizer,
        policy="keep",
    )
    return peaks.measure(16)


def test_to_cuda_micro_batches_travel_one_ahead() -> None:
    micro_batch = 2 * 16 * 256 * 4
    more = on("cuda", 256).activations - on("cpu", 256).activations
    # The one that computes, and the one that is on its way.
    assert more == pytest.approx(2 * micro_batch, rel=0.1)


def test_on_cuda_all_parameters_are_updated_at_once() -> None:
    weights = 8 * 2048 * 2048 * 4

    def beside(peak: Peak) -> int:
        return peak.activations + peak.transient

    assert beside(on("cuda", 2048)) > weights
    assert beside(on("cuda", 2048, partial(torch.optim.AdamW, foreach=False))) < weights / 2
    assert beside(on("cpu", 2048)) < weights / 2


def line(batch_size: int, waits: bool = False) -> tuple[PeakModel, list[tuple[int, int]]]:
    """Peaks that are known: 1000 + 10 for a sample, and where micro-batches wait, 5 for each."""
    asked: list[tuple[int, int]] = []

    def read(size: int, samples: int) -> Reading:
        asked.append((size, samples))
        count = -(-samples // size)
        gradients = 300 if count > 1 else 0
        forward = 700 + gradients + 10 * size + (5 * count if waits else 0)
        return Reading(500, 200, 300, gradients, forward, 900, 950, 0, 7 * samples if waits else 0)

    return PeakModel(batch_size, read, waits), asked


def test_lines_go_through_what_was_measured() -> None:
    peaks, asked = line(1000)
    for size in (1, 3, 77, 400):
        assert peaks.predict(size).device_bytes == 1000 + 10 * size
    assert {size for size, _ in asked} == {2, 8}, "two sizes make a line"
    peaks.measure(77)
    assert asked[-1] == (77, 3 * 77)
    assert peaks.is_measured(77)
    assert not peaks.is_measured(78)
    assert peaks.predict(1000).device_bytes == 700 + 10 * 1000, "alone, it meets no accumulators"
    parts = peaks.predict(100)
    assert (parts.parameters, parts.optimizer, parts.gradients) == (500, 200, 300)
    assert (parts.activations, parts.transient) == (1000, 0)


def test_what_waits_grows_with_the_number_of_micro_batches() -> None:
    peaks, asked = line(1000, waits=True)
    for size in (1, 10, 30):
        count = -(-1000 // size)
        assert peaks.predict(size).device_bytes == 1000 + 10 * size + 5 * count
        assert peaks.predict(size).host_bytes == 7000
    # Not the smallest size: 1000 of them leave more behind.
    size, peak = peaks.smallest_peak()
    assert 20 <= size <= 25
    assert peak.device_bytes == min(1000 + 10 * n + 5 * -(-1000 // n) for n in range(1, 1000))
    assert all(samples <= 1000 for _, samples in asked)


@pytest.mark.parametrize(
    ("budget", "expected"),
    [(10_700, 1000), (10_699, 500), (6_000, 500), (5_999, 334), (1_030, 3), (1_010, 1)],
)
def test_largest_within_is_measured_and_within(budget: int, expected: int) -> None:
    peaks, asked = line(1000)
    assert peaks.largest_within(budget) == expected
    assert peaks.is_measured(expected)
    assert peaks.predict(expected).device_bytes <= budget
    assert len(asked) < 12


def test_nothing_is_within_too_little() -> None:
    peaks, _ = line(1000)
    assert peaks.largest_within(1_009) is None
    assert peaks.smallest_peak()[0] == 1
    assert peaks.smallest_peak()[1].device_bytes == 1_010


def test_a_curve_is_followed() -> None:
    """Where lines mislead, what is measured decides."""

    def read(size: int, samples: int) -> Reading:
        return Reading(0, 0, 0, 0, 100 + size**2, 0, 0, 0, 0)

    for budget in (110, 164, 700, 9_000):
        peaks = PeakModel(200, read, waits_for_all=False)
        largest = peaks.largest_within(budget)
        assert largest is not None
        assert 100 + largest**2 <= budget
        assert 100 + (2 * largest) ** 2 > budget


def test_what_is_measured_can_fit_where_nothing_was_predicted_to() -> None:
    def read(size: int, samples: int) -> Reading:
        return Reading(0, 0, 0, 0, 1000 * size**0.5, 0, 0, 0, 0)

    peaks = PeakModel(100, read, waits_for_all=False)
    assert peaks.predict(1).device_bytes > 1100, "on the line through two other sizes"
    assert peaks.largest_within(1100) == 1
    assert PeakModel(100, read, waits_for_all=False).largest_within(999) is None


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_small_batches(batch_size: int) -> None:
    peaks, _ = line(batch_size)
    assert peaks.largest_within(10**6) == batch_size
    assert [peaks.measure(size).device_bytes for size in range(1, batch_size + 1)]


@pytest.mark.parametrize("size", [0, 1001])
def test_sizes_that_are_none(size: int) -> None:
    with pytest.raises(ValueError, match=f"micro_batch_size is {size}; it must be from 1 to 1000"):
        line(1000)[0].predict(size)
