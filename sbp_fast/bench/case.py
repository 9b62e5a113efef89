"""One comparison: contenders that compute the same, and who is compared with whom."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from . import environment
from .rows import Row
from .timing import Call, Spread, Stopwatch, measure, stopwatch_for


@dataclass(frozen=True)
class Contender:
    """Somebody's way to compute a case.

    Attributes:
        opponents: names of contenders -> kind of ratio (see :data:`sbp_fast.bench.rows.RATIO_KINDS`).
        bytes: what a call moves, if that is not the case's own figure (a ceiling).
    """

    name: str
    call: Call
    opponents: dict[str, str] = field(default_factory=dict)
    bytes: int | None = None


@dataclass(frozen=True)
class Case:
    """What is computed, and by whom. ``bytes`` is what one call must move at least, caches aside."""

    benchmark: str
    name: str
    dtype: torch.dtype
    tensors: int
    elements: int
    bytes: int
    contenders: Sequence[Contender]
    calls: int = 1

    def measure(
        self, device: torch.device, rounds: int, stopwatch: Stopwatch | None = None
    ) -> list[Row]:
        """A row for each contender and each of its opponents; one row for a contender without any."""
        spreads = measure(
            {contender.name: contender.call for contender in self.contenders},
            stopwatch or stopwatch_for(device),
            rounds=rounds,
            calls=self.calls,
        )
        moved = {
            contender.name: self.bytes if contender.bytes is None else contender.bytes
            for contender in self.contenders
        }
        rows = []
        for contender in self.contenders:
            for opponent, kind in (contender.opponents or {"": ""}).items():
                ratio = None
                if opponent:
                    ratio = _ratio(
                        kind,
                        spreads[contender.name],
                        spreads[opponent],
                        moved[contender.name],
                        moved[opponent],
                    )
                rows.append(
                    self._row(
                        contender.name,
                        device,
                        spreads[contender.name],
                        moved[contender.name],
                        opponent,
                        kind,
                        ratio,
                    )
                )
        return rows

    def _row(
        self,
        contender: str,
        device: torch.device,
        spread: Spread,
        moved: int,
        opponent: str,
        kind: str,
        ratio: Spread | None,
    ) -> Row:
        return Row(
            benchmark=self.benchmark,
            case=self.name,
            contender=contender,
            device=environment.device_name(device),
            dtype=str(self.dtype).removeprefix("torch."),
            tensors=self.tensors,
            elements=self.elements,
            bytes=moved,
            threads=torch.get_num_threads(),
            rounds=len(spread.values),
            median_ms=spread.median,
            min_ms=spread.minimum,
            max_ms=spread.maximum,
            iqr_ms=spread.interquartile_range,
            gb_per_s=moved / spread.median / 1e6,
            us_per_tensor=spread.median * 1e3 / self.tensors,
            ratio_to=opponent,
            ratio_kind=kind,
            ratio_median=None if ratio is None else ratio.median,
            ratio_min=None if ratio is None else ratio.minimum,
            ratio_max=None if ratio is None else ratio.maximum,
            revision=environment.revision(),
            date=environment.now(),
        )


def _ratio(
    kind: str, contender: Spread, opponent: Spread, contender_bytes: int, opponent_bytes: int
) -> Spread:
    if kind == "time":
        return contender.over(opponent)
    if kind == "speedup":
        return opponent.over(contender)
    if kind == "bandwidth":
        return opponent.over(contender).times(contender_bytes / opponent_bytes)
    raise ValueError(f"kind of ratio is {kind!r}; it must be 'time', 'speedup' or 'bandwidth'")
