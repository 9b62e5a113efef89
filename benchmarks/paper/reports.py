"""The tables as Markdown and as HTML, with the plots."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .profiles import Profile
from .results import Row
from .tables import Table, agreement, tables_of

MARKDOWN, HTML = "report.md", "report.html"

_TITLE = "The evaluation of Small-Batch Processing, done again"


@dataclass(frozen=True)
class Report:
    """What both formats say, in this order."""

    introduction: tuple[str, ...]
    agreement: tuple[str, ...]
    tables: tuple[Table, ...]
    plots: tuple[Path, ...]


def report_of(
    profile: Profile, rows: Sequence[Row], run: dict[str, Any], plots: Sequence[Path]
) -> Report:
    """
    Args:
        run: what ``environment.json`` holds.
        plots: files beside the report.
    """
    settings, environment = run["settings"], run["environment"]
    introduction = (
        f"Profile {profile.name}: {len(profile.seeds)} seeds, images of {profile.pixels} pixels, models "
        f"{'reduced in width' if profile.reduced else 'as their papers define them'}; trained under "
        f"{profile.budgets[-1]} of device memory.",
        *settings["datasets"].values(),
        f"{environment['processor']}, {environment['threads']} threads"
        + (f", {environment['gpu']['name']}" if "gpu" in environment else "")
        + f"; torch {environment['torch']}, sbp_fast {environment['revision']}, "
        f"begun {environment['date']}, load average before it {environment['load_average_1_minute']}.",
        "F: memory ran out, as it did when it was tried under the budget. Columns of the paper's tables "
        "(Ravi Kumar and Sivakumar 2025) are its own figures, of another device, other data and models "
        "of full size. The full batch without a budget is the truth that SBP must match: same weights, "
        "same order of the data. Plain accumulation takes SBP's micro-batches, and normalises each by "
        "itself.",
        "Where device memory is the CPU's, tensors are counted, which costs every way a few percent of "
        "its time.",
    )
    return Report(
        introduction,
        tuple(agreement(profile, rows)),
        tuple(
            table
            for training in profile.trainings
            for table in tables_of(profile, rows, training.model)
        ),
        tuple(plots),
    )


def as_markdown(report: Report) -> str:
    parts = [
        f"# {_TITLE}",
        *report.introduction,
        "\n".join(f"- {line}" for line in report.agreement),
    ]
    for table in report.tables:
        lines = [table.header, ("---",) * len(table.header), *table.rows]
        grid = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        parts += [f"## {table.title}", grid]
    parts += [f"![{plot.stem}]({plot.name})" for plot in report.plots]
    return "\n\n".join(parts) + "\n"


def as_html(report: Report) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"

    parts = [f"<h1>{_TITLE}</h1>", *(f"<p>{html.escape(text)}</p>" for text in report.introduction)]
    parts += ["<ul>", *(f"<li>{html.escape(line)}</li>" for line in report.agreement), "</ul>"]
    for table in report.tables:
        parts += [f"<h2>{html.escape(table.title)}</h2>", "<table>", row(table.header, "th")]
        parts += [*(row(cells, "td") for cells in table.rows), "</table>"]
    parts += [
        f'<img src="{html.escape(plot.name)}" alt="{html.escape(plot.stem)}">'
        for plot in report.plots
    ]
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{_TITLE}</title>\n'
        "<style>body{font-family:sans-serif;margin:2em}table{border-collapse:collapse}"
        "th,td{border:1px solid #bbb;padding:.3em .6em;text-align:right}img{max-width:100%}</style>\n"
        + "\n".join(parts)
        + "\n</html>\n"
    )


def write(report: Report, folder: Path) -> None:
    (folder / MARKDOWN).write_text(as_markdown(report), encoding="utf-8")
    (folder / HTML).write_text(as_html(report), encoding="utf-8")
