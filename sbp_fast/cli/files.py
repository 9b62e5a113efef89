"""Files that a command will write: looked at before the work, whose result would be lost."""

from __future__ import annotations

from pathlib import Path

from ..report.extra import import_extra


def check_directory(option: str, path: Path) -> None:
    """Raises FileNotFoundError where the file's directory is not there."""
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(
            f"{option} {path}: there is no directory {path.parent}; create it or name another"
        )


def check_figure(option: str, path: Path) -> None:
    """Raises FileNotFoundError, ImportError without matplotlib, or ValueError for a name whose ending is
    no format that it draws."""
    check_directory(option, path)
    formats = import_extra("matplotlib.backend_bases").FigureCanvasBase.get_supported_filetypes()
    if path.suffix.lower().removeprefix(".") not in formats:
        raise ValueError(
            f"{option} {path}: the name must end in a format that can be drawn, such as .png, "
            ".svg or .pdf"
        )
