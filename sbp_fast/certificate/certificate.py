"""What :func:`sbp_fast.verify` found out, in numbers, in words, as JSON and as a picture."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from .words import in_words

SCHEMA = "sbp_fast.certificate"
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class ParameterError:
    """One parameter at one micro-batch size. Errors are relative to the oracle's gradient.

    A gradient that nearly vanishes is measured against 1e-3 of the norm of all gradients instead. What
    is not finite is infinitely far.

    Attributes:
        micro_batch_size: in samples.
        parameter: its name, as ``named_parameters`` gives it; the loss's own are under ``loss_fn``.
        error: of :meth:`StreamedAccumulator.backward`.
        plain_error: of plain accumulation.
        tolerance: the largest error that is put down to rounding.
        norm: the 2-norm of the oracle's gradient.
    """

    micro_batch_size: int
    parameter: str
    error: float
    plain_error: float
    tolerance: float
    norm: float

    @property
    def layer(self) -> str:
        """The module that holds the parameter; the parameter itself, where the model does."""
        return self.parameter.rpartition(".")[0] or self.parameter


@dataclass(frozen=True)
class TotalError:
    """All gradients as one vector at one micro-batch size: the norm of the difference over the norm.

    Attributes:
        failure, plain_failure: the exception that ended the run, so that there are no gradients; empty
            where there was none.
    """

    micro_batch_size: int
    error: float
    plain_error: float
    failure: str = ""
    plain_failure: str = ""


class Broken(NamedTuple):
    """Where a gradient is off by more than the tolerance."""

    layer: str
    micro_batch_size: int
    parameter: str
    error: float


@dataclass(frozen=True)
class Certificate:
    """Whether the micro-batch size is a pure performance knob for one model, loss and batch.

    Attributes:
        rows: a row per parameter and micro-batch size, parameters in the model's order.
        totals: a row per micro-batch size.
        tolerance: the one asked for, or the usual one of the dtype. A row's may be larger, see
            :func:`sbp_fast.verify`.
        rounding: the error of the whole batch at once in the model's own dtype, all gradients as one
            vector.
        samples: that were compared.
        samples_asked: that were to be compared. More than ``samples`` where memory did not allow it.
        oracle: what everything is compared with, in words.
        environment: versions, device, dtype, seed and options, as text.
    """

    rows: tuple[ParameterError, ...]
    totals: tuple[TotalError, ...]
    tolerance: float
    rounding: float
    samples: int
    samples_asked: int
    oracle: str
    environment: Mapping[str, str]

    @property
    def holds(self) -> bool:
        """True where no parameter's gradient, at no micro-batch size, is off by more than rounding."""
        return self.first_broken is None

    @property
    def first_broken(self) -> Broken | None:
        """The first layer of the model that is off, and the first micro-batch size at which it is.

        A run that ended in an exception has no layer to name. It counts (as off everywhere) where no
        other run is off.
        """
        failed = {total.micro_batch_size for total in self.totals if total.failure}
        return self._first_beyond(lambda row: row.error, failed)

    @property
    def plain_first_broken(self) -> Broken | None:
        """The same of plain accumulation."""
        failed = {total.micro_batch_size for total in self.totals if total.plain_failure}
        return self._first_beyond(lambda row: row.plain_error, failed)

    def _first_beyond(
        self, error: Callable[[ParameterError], float], failed: set[int]
    ) -> Broken | None:
        beyond = [row for row in self.rows if error(row) > row.tolerance]
        # Sorting keeps the model's order among equals.
        for row in sorted(beyond, key=lambda row: row.micro_batch_size in failed):
            return Broken(row.layer, row.micro_batch_size, row.parameter, error(row))
        return None

    def __str__(self) -> str:
        return in_words(self)

    def save(self, path: str | Path) -> None:
        """Writes JSON. Figures that are not finite are null there."""
        content = {
            "schema": SCHEMA,
            "version": SCHEMA_VERSION,
            "holds": self.holds,
            "first_broken": self.first_broken and self.first_broken._asdict(),
            "plain_first_broken": self.plain_first_broken and self.plain_first_broken._asdict(),
            **asdict(self),
        }
        text = json.dumps(_without_infinity(content), indent=2, allow_nan=False)
        Path(path).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Certificate:
        """Reads what :meth:`save` wrote.

        Raises:
            ValueError: it is no certificate, or one of another version.
        """
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        found = (content.get("schema"), content.get("version"))
        if found != (SCHEMA, SCHEMA_VERSION):
            raise ValueError(
                f"{path} has schema {found[0]!r}, version {found[1]!r}; expected {SCHEMA!r}, version "
                f"{SCHEMA_VERSION}: verify again with this version of sbp_fast"
            )
        values = {field.name: _with_infinity(content[field.name]) for field in fields(cls)}
        values["rows"] = tuple(ParameterError(**row) for row in values["rows"])
        values["totals"] = tuple(TotalError(**total) for total in values["totals"])
        return cls(**values)

    def plot(self, path: str | Path) -> None:
        """Draws the errors by layer, of both, for every micro-batch size.

        Args:
            path: its suffix names the format (``.png``, ``.svg``, ``.pdf``).

        Raises:
            ImportError: matplotlib is not installed; the message says how to get it.
        """
        from ..report.certificate_plot import save_certificate_figure

        save_certificate_figure(Path(path), self)


def _without_infinity(value: Any) -> Any:
    """JSON has no word for it."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return _mapped(_without_infinity, value)


def _with_infinity(value: Any) -> Any:
    return math.inf if value is None else _mapped(_with_infinity, value)


def _mapped(function: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, dict):
        return {name: function(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [function(each) for each in value]
    return value
