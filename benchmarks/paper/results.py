"""The results: a row per finished cell, appended to a CSV file as soon as it is known."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

# What became of a cell.
FINISHED, FAILED = "finished", "F"


@dataclass(frozen=True)
class Cell:
    """What is measured at once: one training, or a few steps under a smaller budget.

    Attributes:
        model: its name.
        batch: samples in the large batch.
        way: one of :data:`benchmarks.paper.ways.WAYS`.
        budget: bytes of device memory; 0: no limit.
        seed: of the weights and of the order of the data.
        trained: whether to the end, and evaluated.
    """

    model: str
    batch: int
    way: str
    budget: int
    seed: int
    trained: bool


@dataclass(frozen=True)
class Row:
    """A finished cell.

    Attributes:
        model, batch, way, budget, seed, trained: of the :class:`Cell`.
        outcome: :data:`FINISHED`, or :data:`FAILED` where memory ran out.
        reason: why it failed.
        dataset: its name.
        micro_batch: samples computed at once.
        steps: that were made.
        percent: accuracy, or for segmentation mean IoU, on the test set.
        step_ms: time of a step, the median over all but the first.
        sample_ms: the same over the samples of the batch.
        peak_bytes: of device memory, at most.
        host_bytes: of host memory in which activations waited, at most.
        gradient_difference: the first step's gradient against the full batch's, in float64, relative.
        device, threads, revision, date: where, with what and when.
    """

    model: str
    batch: int
    way: str
    budget: int
    seed: int
    trained: int
    outcome: str
    reason: str
    dataset: str
    micro_batch: int
    steps: int
    percent: float | None
    step_ms: float | None
    sample_ms: float | None
    peak_bytes: int | None
    host_bytes: int | None
    gradient_difference: float | None
    device: str
    threads: int
    revision: str
    date: str

    @property
    def cell(self) -> Cell:
        return Cell(
            self.model, self.batch, self.way, self.budget, self.seed, trained=bool(self.trained)
        )


COLUMNS = tuple(field.name for field in fields(Row))


class Results:
    """The rows in a file. What is there already is read; new rows are appended.

    A last line without an end, as a killed run may leave it, is dropped.

    Raises:
        ValueError: the file's columns are others, or a line is no row.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        if not path.exists():
            self._write("w", [COLUMNS])
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            with path.open("r+b") as stream:
                stream.truncate(len(whole))
        self.rows = _read(path)

    def append(self, row: Row) -> None:
        """Adds a row, which outlives this process once this returns."""
        values = ("" if value is None else value for value in vars(row).values())
        self._write("a", [tuple(values)])
        self.rows.append(row)

    def _write(self, mode: str, lines: Sequence[Sequence[object]]) -> None:
        with self._path.open(mode, newline="") as stream:
            csv.writer(stream, lineterminator="\n").writerows(lines)
            stream.flush()
            os.fsync(stream.fileno())


def _read(path: Path) -> list[Row]:
    with path.open(newline="") as stream:
        reader = csv.DictReader(stream)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(
                f"{path} has the columns {reader.fieldnames}; expected {list(COLUMNS)}: another version "
                "wrote it, name another folder with --output"
            )
        rows = []
        for record in reader:
            try:
                rows.append(_row(record))
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"{path}, line {reader.line_num}: no row of results ({error}); remove that line, and "
                    "its cell is measured again"
                ) from error
        return rows


def _row(record: dict[str, str]) -> Row:
    values: dict[str, object] = {}
    for field in fields(Row):
        text, kind = record[field.name], str(field.type)
        if kind == "str":
            values[field.name] = text
        elif kind.endswith("None") and not text:
            values[field.name] = None
        else:
            values[field.name] = int(text) if kind.startswith("int") else float(text)
    return Row(**values)  # type: ignore[arg-type]
