"""Which module is calling: by its name in the model, for tables and for errors."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from torch import nn

_NOBODY = "(no module)"


class Names:
    """Names of modules, as ``named_modules`` gives them; those of a loss are under ``loss_fn``."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._names: dict[int, tuple[str, nn.Module]] = {}
        for root, module in zip(("", "loss_fn"), modules, strict=False):
            for name, child in module.named_modules(prefix=root):
                self._names.setdefault(id(child), (name or type(child).__name__, child))

    def of_caller(self) -> tuple[str, nn.Module | None]:
        """The innermost module in whose method we are, or that a function is given as ``module``."""
        frame = sys._getframe(1)
        while frame is not None:
            code = frame.f_code
            for variable in ("self", "module"):
                if variable in code.co_varnames[: code.co_argcount]:
                    found = self._names.get(id(frame.f_locals.get(variable)))
                    if found is not None:
                        return found
            frame = frame.f_back  # type: ignore[assignment]
        return _NOBODY, None
