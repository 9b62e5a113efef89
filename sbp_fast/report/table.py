"""A plain text table."""

from __future__ import annotations

from collections.abc import Sequence


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Header, rule and rows as lines of text; the first column flush left, the others flush right.

    Raises ValueError for a row that has not one cell for each column.
    """
    for row in rows:
        if len(row) != len(header):
            raise ValueError(
                f"table row {list(row)} has {len(row)} cells, expected {len(header)}: {list(header)}"
            )
    columns = list(zip(header, *rows, strict=True))
    widths = [max(len(cell) for cell in column) for column in columns]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        texts = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
        return "  ".join(texts).rstrip()

    return "\n".join([line(header), line(["-" * width for width in widths]), *map(line, rows)])
