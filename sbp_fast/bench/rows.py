"""The one format of all results: a row per contender and opponent, in CSV."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

# What a ratio says. In each, the contender stands above the line.
#   speedup    time of the opponent / time of the contender: above 1, the contender is faster
#   time       time of the contender / time of the opponent: below 1, the contender is faster
#   bandwidth  bytes per second of the contender / of the opponent (a ceiling)
RATIO_KINDS = ("speedup", "time", "bandwidth")


@dataclass(frozen=True)
class Row:
    """One contender in one case, compared with one opponent or with none.

    Attributes:
        benchmark: the question asked (``accumulate``, ``step``, ...).
        case: what exactly is computed.
        contender: who computes it.
        device: as :func:`sbp_fast.bench.environment.device_name` gives it.
        dtype: of the gradients, or of the model.
        tensors, elements: how many in one call.
        bytes: that one call must move at least, caches aside; 0 where that is not the question.
        threads: of the CPU.
        rounds: measurements that the figures are over.
        median_ms, min_ms, max_ms, iqr_ms: time of one call, and the width of its middle half.
        gb_per_s: ``bytes`` over the median time, in 10^9 bytes per second; 0 without ``bytes``.
        us_per_tensor: the median time over ``tensors``, in microseconds.
        ratio_to: the opponent, or empty.
        ratio_kind: one of :data:`RATIO_KINDS`, or empty.
        ratio_median, ratio_min, ratio_max: of the ratios taken round by round; None without opponent.
        revision: of the source, where it is known.
        date: UTC, ISO 8601.
    """

    benchmark: str
    case: str
    contender: str
    device: str
    dtype: str
    tensors: int
    elements: int
    bytes: int
    threads: int
    rounds: int
    median_ms: float
    min_ms: float
    max_ms: float
    iqr_ms: float
    gb_per_s: float
    us_per_tensor: float
    ratio_to: str
    ratio_kind: str
    ratio_median: float | None
    ratio_min: float | None
    ratio_max: float | None
    revision: str
    date: str


COLUMNS = tuple(column.name for column in fields(Row))


def write_csv(path: Path, rows: Iterable[Row]) -> None:
    """Writes ``rows`` under a line with the names of the columns; None becomes an empty field."""
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({name: _as_text(value) for name, value in asdict(row).items()})


def read_csv(path: Path) -> list[Row]:
    """The rows that :func:`write_csv` wrote.

    Raises:
        ValueError: the columns are not those of :class:`Row`.
    """
    with path.open(newline="") as stream:
        reader = csv.DictReader(stream)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(
                f"{path} has the columns {reader.fieldnames}; expected {list(COLUMNS)}: it was written "
                "by another version, measure again"
            )
        return [_from_text(record) for record in reader]


def as_table(rows: Sequence[Row]) -> str:
    """Rows for human eyes, as lines of equal length; one contender's opponents in one line."""
    header = ("case", "contender", "median ms", "min..max", "GB/s", "ratio")
    lines: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        line = lines.setdefault(
            (row.case, row.contender),
            [
                row.case,
                row.contender,
                _figure(row.median_ms),
                f"{_figure(row.min_ms)}..{_figure(row.max_ms)}",
                f"{row.gb_per_s:.1f}" if row.bytes else "",
                "",
            ],
        )
        if row.ratio_median is not None:
            ratio = f"{row.ratio_median:.3f} {row.ratio_kind} to {row.ratio_to}"
            line[-1] += f", {ratio}" if line[-1] else ratio
    table = [list(header), *lines.values()]
    for position in range(len(table) - 1, 1, -1):
        if table[position][0] == table[position - 1][0]:
            table[position][0] = ""
    widths = [max(len(line[column]) for line in table) for column in range(len(header) - 1)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line[:-1], widths, strict=True))
        )
        + "  "
        + line[-1]
        for line in table
    )


def _figure(value: float) -> str:
    return f"{value:.4f}" if value < 1 else f"{value:.2f}"


def _as_text(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _from_text(record: dict[str, str]) -> Row:
    values: dict[str, object] = {}
    for column in fields(Row):
        text = record[column.name]
        kind = str(column.type)
        if kind == "str":
            values[column.name] = text
        elif kind == "int":
            values[column.name] = int(text)
        else:
            values[column.name] = float(text) if text else None
    return Row(**values)  # type: ignore[arg-type]
