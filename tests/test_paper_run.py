"""The evaluation from end to end: what it writes, that it goes on where it stopped, and what it shows."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_paper_data import make_fashion_mnist

from benchmarks.paper import __main__ as command
from benchmarks.paper import evaluate as evaluation
from benchmarks.paper.cells import cells_of
from benchmarks.paper.data import load
from benchmarks.paper.figures import difference_from_truth, trained
from benchmarks.paper.profiles import FULL, SMALL, TINY, Profile
from benchmarks.paper.published import TABLES
from benchmarks.paper.results import COLUMNS, FAILED, FINISHED, Results, Row
from benchmarks.paper.run import Runner
from benchmarks.paper.ways import PLAIN, SBP, TRUTH, WITHOUT

CELLS = len(list(cells_of(TINY)))


@pytest.fixture(name="arguments", scope="module")
def _arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of the command; data and cache of their own."""
    folder = tmp_path_factory.mktemp("paper")
    data = str(make_fashion_mnist(folder / "data"))
    return [
        *("--profile", "tiny", "--device", "cpu", "--cache", str(folder / "cache")),
        *("--classification-folder", data, "--segmentation-folder", data),
    ]


@pytest.fixture(name="finished", scope="module")
def _finished(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run from end to end."""
    output = tmp_path_factory.mktemp("results") / "tiny"
    assert command.main([*arguments, "--output", str(output)]) == 0
    return output


def rows_of(output: Path) -> list[Row]:
    return Results(output / evaluation.CELLS).rows


def test_every_cell_is_measured_once(finished: Path) -> None:
    rows = rows_of(finished)
    assert [row.cell for row in rows] == list(cells_of(TINY))
    assert {row.outcome for row in rows} == {FINISHED, FAILED}
    for row in rows:
        assert (row.percent is not None) == (row.outcome == FINISHED and bool(row.trained))
        if row.outcome == FAILED:
            assert row.reason
        else:
            assert row.peak_bytes
            assert row.step_ms == pytest.approx(row.batch * (row.sample_ms or 0))


def test_no_budget_is_exceeded_and_none_is_assumed(finished: Path) -> None:
    rows = rows_of(finished)
    for row in rows:
        if row.outcome == FINISHED and row.budget:
            assert (row.peak_bytes or 0) <= row.budget
    failed = [row for row in rows if row.way == WITHOUT and row.outcome == FAILED]
    assert failed
    assert all("out of memory" in row.reason for row in failed)
    # What failed within the budget needs more than that without it.
    for row in failed:
        truth = next(
            one for one in rows if (one.model, one.batch, one.way) == (row.model, row.batch, TRUTH)
        )
        assert (truth.peak_bytes or 0) > row.budget


def test_first_gradient_is_the_full_batchs_with_sbp_alone(finished: Path) -> None:
    compared = [row for row in rows_of(finished) if row.gradient_difference is not None]
    assert {row.way for row in compared} == {SBP, PLAIN}
    for row in compared:
        assert row.seed == TINY.seeds[0]
        if row.way == SBP:
            assert (row.gradient_difference or 0) < 1e-12
    # Swin's layer norm knows of no other samples; U-Net's batch norm does.
    plain = [
        row
        for row in compared
        if (row.model, row.way) == ("U-Net", PLAIN) and row.micro_batch < row.batch
    ]
    assert plain
    assert all((row.gradient_difference or 0) > 1e-3 for row in plain)


def test_reports_say_it_in_tables_with_the_papers_figures_marked(finished: Path) -> None:
    markdown = (finished / "report.md").read_text(encoding="utf-8")
    page = (finished / "report.html").read_text(encoding="utf-8")
    for text in (markdown, page):
        for expected in (
            *("Swin-T: Accuracy (%)", "U-Net: Mean IoU (%)", "table 5, WSBP", "table 5, SBP"),
            *("95% confidence interval", PLAIN, TRUTH, "fashion-mnist", "2 of 2 batch sizes"),
        ):
            assert expected in text
    assert "| 16 | 95 | 90 |" in markdown
    assert page.count("<table>") == page.count("</table>") == 8
    for name in ("accuracy", "time", "memory"):
        assert (finished / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f'src="{name}.png"' in page
    run = json.loads((finished / "environment.json").read_text())
    assert run["environment"]["torch"] == torch.__version__
    assert run["settings"]["profile"]["name"] == "tiny"


def test_killed_run_goes_on(
    finished: Path, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing that is there is measured again; half a line, as a kill may leave it, is."""
    for name in (evaluation.CELLS, evaluation.ENVIRONMENT):
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    cells = tmp_path / evaluation.CELLS
    lines = cells.read_bytes().splitlines(keepends=True)
    cells.write_bytes(b"".join(lines[:-3]) + lines[-3][:20])
    measured = []
    run = Runner.run

    def counted(runner: Runner, cell: object) -> Row:
        measured.append(cell)
        return run(runner, cell)  # type: ignore[arg-type]

    monkeypatch.setattr(Runner, "run", counted)
    assert command.main([*arguments, "--output", str(tmp_path)]) == 0
    assert measured == list(cells_of(TINY))[-3:]
    assert len(rows_of(tmp_path)) == CELLS
    assert cells.read_bytes().startswith(b"".join(lines[:-3]))


def test_finished_run_writes_the_reports_alone(
    finished: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "Runner", None)
    before = (finished / evaluation.CELLS).read_bytes()
    (finished / "report.md").unlink()
    assert command.main([*arguments, "--output", str(finished)]) == 0
    assert (finished / "report.md").exists()
    assert (finished / evaluation.CELLS).read_bytes() == before


def test_results_of_other_settings_are_not_mixed(
    finished: Path, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = json.loads((finished / evaluation.ENVIRONMENT).read_text())
    run["settings"]["profile"]["pixels"] = 28
    (tmp_path / evaluation.ENVIRONMENT).write_text(json.dumps(run))
    assert command.main([*arguments, "--output", str(tmp_path)]) == 2
    assert "another profile" in capsys.readouterr().err


def test_missing_data_is_one_line_on_stderr(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--classification", "flower-102", "--output", str(tmp_path / "results")]
    assert command.main([*arguments, "--profile", "tiny", "--cache", str(tmp_path)]) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1
    assert "--classification-folder FOLDER" in error[0]
    assert not (tmp_path / "results").exists()


def test_too_few_images_for_a_batch_are_refused(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--profile", "small", *arguments[2:]]
    assert command.main([*small, "--output", str(tmp_path)]) == 2
    assert "a batch of 512" in capsys.readouterr().err


def test_same_weights_and_order_give_the_same_training(finished: Path) -> None:
    """A budget that suffices changes nothing."""
    percents: dict[tuple[str, int, int], dict[str, float]] = {}
    for row in rows_of(finished):
        if row.trained and row.percent is not None:
            percents.setdefault((row.model, row.batch, row.seed), {})[row.way] = row.percent
    for by_way in percents.values():
        if WITHOUT in by_way:
            assert by_way[WITHOUT] == pytest.approx(by_way[TRUTH], abs=1e-6)


def test_file_of_other_columns_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cells.csv"
    path.write_text("model,batch\nResNet-50,8\n")
    with pytest.raises(ValueError, match="--output"):
        Results(path)


def test_line_that_is_no_row_is_named(tmp_path: Path) -> None:
    path = tmp_path / "cells.csv"
    with path.open("w", newline="") as stream:
        csv.writer(stream, lineterminator="\n").writerows([COLUMNS, ["ResNet-50", "eight"]])
    with pytest.raises(ValueError, match="line 2"):
        Results(path)


def test_papers_tables_are_whole() -> None:
    """Eight batch sizes each, of which the paper tried one without SBP that did not fail."""
    assert [number for number, _ in TABLES.values()] == [2, 3, 4, 5]
    for _, rows in TABLES.values():
        assert list(rows) == [1024, 512, 256, 128, 64, 32, 16, 8]
        fits = [batch for batch, row in rows.items() if row.without_percent is not None]
        assert fits == [16]


@pytest.mark.parametrize("profile", [SMALL, FULL], ids=lambda profile: profile.name)
def test_profiles_compare_all_models_over_three_seeds(profile: Profile) -> None:
    assert {training.model for training in profile.trainings} == {
        *("ResNet-50", "ResNet-101", "AmoebaNet-D", "U-Net"),
        *("EfficientNet-B0", "ViT-B/16", "Swin-T"),
    }
    assert len(profile.seeds) >= 3
    assert [size / profile.budget_bytes[0] for size in profile.budget_bytes] == [1, 2, 3]


@pytest.mark.slow
def test_sbp_trains_to_the_truths_accuracy(tmp_path: Path) -> None:
    """A reduced ResNet-50 on the slice of Fashion-MNIST or the full set, in the small profile's way."""
    profile = replace(SMALL, trainings=SMALL.trainings[:1], batches=(256,), budgets=("48MiB",))
    datasets = {"classification": load(profile.classification, None, tmp_path, profile.pixels)}
    rows = evaluation.evaluate(profile, datasets, torch.device("cpu"), tmp_path / "results")
    difference = difference_from_truth(rows, "ResNet-50", 256)
    assert difference is not None
    assert abs(difference.mean) < 5
    truth = trained(rows, "ResNet-50", 256, TRUTH)
    assert truth.percent is not None
    assert truth.percent.mean > 50
