"""Import what only the reports need, or say how to install it."""

from __future__ import annotations

import importlib
from types import ModuleType


def import_extra(name: str) -> ModuleType:
    """The module ``name``; ImportError with the cure where it is not installed."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        package = name.partition(".")[0]
        if error.name != package:
            raise
        raise ImportError(
            f"{package} is not installed, and this command needs it; "
            "install it with: pip install 'sbp_fast[demo]'",
            name=package,
        ) from error
