"""The demo's pieces in small, and one whole run of two steps."""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import tolerances
import torch
from torch import nn

from sbp_fast.cli import demo, main
from sbp_fast.cli.demo_measure import (
    accuracy_on,
    gradient_difference,
    large_batches,
    run_plain,
)
from sbp_fast.cli.demo_model import PIXEL_MEAN, Normalize, ResNet
from sbp_fast.data import FashionMnist
from sbp_fast.data.fashion_mnist import load_slice
from sbp_fast.memory import parse_bytes
from sbp_fast.report.extra import import_extra
from sbp_fast.report.table import format_table

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def data() -> FashionMnist:
    """A part of the slice: 256 training and 64 test images."""
    whole = load_slice()
    return replace(
        whole,
        train_images=whole.train_images[:256],
        train_labels=whole.train_labels[:256],
        test_images=whole.test_images[:64],
        test_labels=whole.test_labels[:64],
    )


@pytest.fixture
def model() -> ResNet:
    return ResNet(width=8)


def test_model_takes_bytes_and_floats_alike(model: ResNet, data: FashionMnist) -> None:
    images = data.train_images[:5]
    logits = model(images)
    assert logits.shape == (5, 10)
    torch.testing.assert_close(model(images.float() / 255), logits)
    mean = Normalize()(torch.full((1, 28, 28), PIXEL_MEAN))
    assert mean.shape == (1, 1, 28, 28)
    assert mean.abs().max() < 1e-6
    blocks = [m for m in ResNet(blocks=3).modules() if isinstance(m, nn.Conv2d)]
    assert len([m for m in blocks if m.kernel_size == (3, 3)]) + 1 == 6 * 3 + 2


def test_model_s_gradient_does_not_depend_on_the_split(model: ResNet, data: FashionMnist) -> None:
    batch = data.train_images[:32], data.train_labels[:32]
    arguments = model, nn.CrossEntropyLoss(), batch, 12
    assert gradient_difference(*arguments, "exact") < tolerances.STEP[torch.float64]
    assert gradient_difference(*arguments, "micro_batch") > 1e-2


def test_large_batches_go_through_every_image_once_an_epoch() -> None:
    images, labels = torch.arange(10), torch.arange(10) * 2
    batches = list(islice(large_batches(images, labels, 4, seed=1), 4))
    again = list(islice(large_batches(images, labels, 4, seed=1), 4))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(batches, again, strict=True))
    for batch_images, batch_labels in batches:
        assert torch.equal(batch_labels, batch_images * 2)
    first, second = (torch.cat([batches[i][0], batches[i + 1][0]]) for i in (0, 2))
    assert len(first.unique()) == len(second.unique()) == 8
    assert not torch.equal(first, second)


def test_plain_step_is_measured_and_fails_at_the_budget(model: ResNet, data: FashionMnist) -> None:
    before = [p.detach().clone() for p in model.parameters()]
    batch = (data.train_images[:64], data.train_labels[:64])
    free = run_plain(model, nn.CrossEntropyLoss(), [batch, batch], 0.01, None)
    assert free.error is None
    assert free.samples_per_second is not None
    # At least the stem's output, for its norm, and the norm's, for the first block.
    assert free.peak_bytes > 2 * 64 * 8 * 14 * 14 * 4

    tight = run_plain(model, nn.CrossEntropyLoss(), [batch], 0.01, free.peak_bytes // 2)
    assert tight.samples_per_second is None
    assert tight.error is not None
    assert "out of memory" in tight.error
    assert tight.peak_bytes <= free.peak_bytes // 2
    tiny = run_plain(model, nn.CrossEntropyLoss(), [batch], 0.01, 100)
    assert tiny.error is not None
    assert "track asked" in tiny.error, "the model alone does not fit"
    for parameter, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, old), "it works on a copy"
        assert parameter.grad is None


class Oracle(nn.Module):
    """Labels every image with its first pixel; counts in which mode and how many at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.seen: list[tuple[bool, int]] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen.append((self.training, len(images)))
        return nn.functional.one_hot(images[:, 0, 0].long(), 10).float()


def test_accuracy_counts_right_labels_of_uneven_chunks() -> None:
    labels = torch.arange(10)
    images = torch.zeros(10, 28, 28, dtype=torch.uint8)
    images[:, 0, 0] = labels
    images[3, 0, 0] = 4
    oracle = Oracle()
    assert accuracy_on(oracle, images, labels, chunk=4) == 0.9
    assert oracle.seen == [(False, 4), (False, 4), (False, 2)]
    assert oracle.training


@pytest.mark.parametrize("steps", [1, 2, 3, 60])
def test_schedule_warms_up_once_and_never_stops_learning(steps: int) -> None:
    factors = [demo.warm_up_cosine(step, steps) for step in range(steps + 1)]
    assert max(factors) == 1
    assert all(factor > 0 for factor in factors[:-1])
    top = factors.index(1)
    assert factors[: top + 1] == sorted(factors[: top + 1])
    assert factors[top:] == sorted(factors[top:], reverse=True)
    assert factors[-1] < 1e-12


@pytest.mark.parametrize(
    ("steps", "expected"), [(1, [1]), (4, [1, 2, 3, 4]), (60, [10, 20, 30, 40, 50, 60])]
)
def test_evaluations_are_spread_and_end_with_the_last_step(steps: int, expected: list[int]) -> None:
    assert demo.evaluation_steps(steps) == expected


def test_table_aligns_its_columns() -> None:
    table = format_table(("step", "n"), [("plain", "1024"), ("b", "2")])
    assert table.splitlines() == ["step      n", "-----  ----", "plain  1024", "b         2"]
    with pytest.raises(ValueError, match="has 1 cells, expected 2"):
        format_table(("step", "n"), [("plain",)])


def test_missing_extra_names_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(ImportError, match=r"pip install 'sbp_fast\[demo\]'"):
        import_extra("tqdm")
    with pytest.raises(ModuleNotFoundError, match="no_such_part"):
        import_extra("matplotlib.no_such_part")


@pytest.fixture
def _small_data(monkeypatch: pytest.MonkeyPatch, data: FashionMnist) -> None:
    monkeypatch.setattr(demo, "load_fashion_mnist", lambda directory: data)
    monkeypatch.setattr(demo, "ResNet", lambda: ResNet(width=8))


@pytest.mark.usefixtures("_small_data")
def test_whole_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("tqdm")
    figure = tmp_path / "demo.png"
    options = "--device cpu --batch-size 128 --micro-batch-size 16 --steps 2 --budget 3MiB --output"
    status = main(["demo", *options.split(), str(figure)])
    printed = capsys.readouterr().out
    assert status == 0
    assert "slice shipped with sbp_fast" in printed
    assert "torch.OutOfMemoryError: out of memory: aten." in printed
    assert "2/2" in printed, "the progress bar"
    rows = printed[printed.index("step   ") :].splitlines()
    plain, free, streamed = rows[2:5]
    assert plain.startswith("plain, budget 3.0 MiB")
    assert "out of memory" in plain
    assert free.startswith("plain, no budget")
    (peak,) = mebibytes(free)
    assert peak > 3
    assert streamed.startswith("SBP, budget 3.0 MiB")
    _, peak, waiting = mebibytes(streamed)
    assert 0 < peak <= 3
    assert waiting > 0
    assert streamed.endswith("%")
    assert figure.read_bytes().startswith(PNG_SIGNATURE)


def mebibytes(row: str) -> list[float]:
    """All sizes in a row of the table."""
    sizes = re.findall(r"[\d.]+ (?:Ki|Mi)?B\b", row)
    return [parse_bytes(size.replace(" ", "")) / 2**20 for size in sizes]


@pytest.mark.usefixtures("_small_data")
def test_micro_batch_over_the_budget_becomes_smaller(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = (
        "--device cpu --batch-size 128 --micro-batch-size 128 --budget 3MiB --steps 1 --output"
    )
    assert main(["demo", *options.split(), str(tmp_path / "demo.png")]) == 0
    printed = capsys.readouterr().out
    row = next(line for line in printed.splitlines() if line.startswith("SBP"))
    assert "128  " in row
    assert "64  " in row


@pytest.mark.usefixtures("_small_data")
def test_a_budget_that_nothing_fits_into_says_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = "--device cpu --batch-size 128 --micro-batch-size 128 --budget 200KiB --output"
    assert main(["demo", *options.split(), str(tmp_path / "demo.png")]) == 1
    assert "Try a larger --budget" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "much"], "memory budget 'much' is no size"),
        (["--data", "nowhere"], "'nowhere' (the directory given) does not hold train-images"),
        (["--batch-size", "1000000"], "--batch-size 1000000, expected at most the"),
        (["--output", "no/such/place.png"], "there is no directory no/such"),
    ],
)
def test_argument_that_cannot_be_used_ends_the_run_at_once(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--device", "cpu", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("sbp-fast demo: ")
    assert message in captured.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_cuda_where_there_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--device", "cuda"]) == 2
    assert "use --device cpu" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "many", "²"])
def test_counts_below_one_are_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="expected a whole number >= 1"):
        demo.positive(text)
    assert demo.positive("7") == 7


def test_defaults_fit_the_shipped_slice() -> None:
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    arguments = parser.parse_args([])
    assert arguments.micro_batch_size < arguments.batch_size <= len(load_slice().train_labels)
