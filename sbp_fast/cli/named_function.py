"""The function that ``package.module:function`` or ``path/to/file.py:function`` names, and what it
returns."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

POSITIONAL = ("model", "loss_fn", "inputs", "targets")


class BadInputError(Exception):
    """What was asked for is not there. The message is one line and says what to do."""


def split_name(target: str) -> tuple[str, str]:
    """Module (or file) and function.

    Raises:
        BadInputError: there is no colon between two names.
    """
    module, _, function = target.rpartition(":")
    if not module or not function:
        raise BadInputError(
            f"{target!r} names no function; expected package.module:function or path/to/file.py:function"
        )
    return module, function


@contextmanager
def importable(module: str) -> Iterator[None]:
    """While inside, the current directory can be imported from, and that of a module that is a file."""
    before = list(sys.path)
    sys.path.insert(0, str(Path.cwd()))
    if _is_file(module):
        sys.path.insert(0, str(Path(module).resolve().parent))
    try:
        yield
    finally:
        sys.path[:] = before


def find_function(module: str, function: str) -> Callable[[], Any]:
    """Imports the module, and takes the function from it.

    Raises:
        BadInputError: no such module, no such function, or one that needs arguments.
        Exception: whatever the module raises when it is imported.
    """
    found = getattr(_load_file(Path(module)) if _is_file(module) else _load(module), function, None)
    if not callable(found):
        what = f"no {function!r}" if found is None else f"{function!r}, which is no function"
        raise BadInputError(f"{module} has {what}; expected a function without arguments")
    try:
        inspect.signature(found).bind()
    except TypeError as error:
        raise BadInputError(
            f"{module}:{function} needs arguments ({error}); expected a function without any"
        ) from error
    callee: Callable[[], Any] = found
    return callee


def as_arguments(
    returned: Any, name: str, called: Callable[..., Any], called_name: str
) -> dict[str, Any]:
    """What the function called ``name`` returned, as arguments of ``called``.

    Raises:
        BadInputError: neither four values nor a dict with what is needed.
    """
    if isinstance(returned, dict):
        try:
            inspect.signature(called).bind(**returned)
        except TypeError as error:
            raise BadInputError(
                f"{name} returned a dict with {sorted(map(str, returned))} ({error}); expected the "
                f"arguments of {called_name}"
            ) from error
        return returned
    if isinstance(returned, (tuple, list)) and len(returned) == len(POSITIONAL):
        return dict(zip(POSITIONAL, returned, strict=True))
    what = f"a {type(returned).__name__}"
    if isinstance(returned, (tuple, list)):
        what += f" of {len(returned)}"
    raise BadInputError(
        f"{name} returned {what}; expected (model, loss_fn, inputs, targets), or a dict of the arguments "
        f"of {called_name}"
    )


def _is_file(module: str) -> bool:
    return module.endswith(".py") or "/" in module or "\\" in module


def _load(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # What the module itself imports is not to be found in the directory we are in.
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        raise BadInputError(
            f"there is no module {error.name!r}, neither installed nor in {Path.cwd()}; name one, or a "
            "file as path/to/file.py"
        ) from error


def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise BadInputError(f"there is no file {path}; name one, or a module as package.module")
    # A name of its own: the file may be called like a module that is in use.
    name = f"_verified_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise BadInputError(f"{path} is no Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    # Where dataclasses, for one, look for it.
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
