"""Import what only the evaluation needs, or say how to install it."""

from __future__ import annotations

import importlib
from types import ModuleType


def import_bench(name: str, distribution: str) -> ModuleType:
    """The module ``name`` of the package ``distribution``; ImportError with the cure where it is not
    installed."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name.partition(".")[0]:
            raise
        raise ImportError(
            f"{distribution} is not installed, and the evaluation needs it; install it with: pip install "
            "'sbp_fast[demo,bench]'",
            name=name,
        ) from error
