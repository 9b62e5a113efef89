"""What the commands have in common that work on what a function of the user's returns."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .named_function import BadInputError, as_arguments, find_function, importable, split_name


def exit_status(command: str, work: Callable[[], int]) -> int:
    """Of ``work``; 2, and a line on standard error, where it ends in an exception."""
    try:
        return work()
    except (
        BadInputError,
        ImportError,
        NotImplementedError,
        OSError,
        TypeError,
        ValueError,
    ) as error:
        print(f"sbp-fast {command}: {' '.join(str(error).split())}", file=sys.stderr)
    except Exception as error:
        # Out of the user's code, as a rule, where only its lines tell more.
        traceback.print_exc()
        print(f"sbp-fast {command}: ended in {type(error).__name__}, see above", file=sys.stderr)
    return 2


@contextmanager
def arguments_for(
    called: Callable[..., Any],
    called_name: str,
    arguments: argparse.Namespace,
    passed_on: Collection[str],
) -> Iterator[dict[str, Any]]:
    """Calls the function that ``arguments.function`` names; gives what it returned as arguments of
    ``called``. While inside, what lies beside it can be imported.

    Args:
        passed_on: names of arguments that go before those returned, where they are given.

    Raises:
        BadInputError: there is no such function, or it returned something else.
    """
    given = {name: value for name, value in vars(arguments).items() if name in passed_on}
    module, function = split_name(arguments.function)
    with importable(module):
        torch.manual_seed(given.get("seed", 0))
        returned = find_function(module, function)()
        yield {**as_arguments(returned, arguments.function, called, called_name), **given}
