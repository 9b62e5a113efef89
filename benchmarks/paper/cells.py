"""Which cells a profile has, in the order in which they are measured."""

from __future__ import annotations

from collections.abc import Iterator

from .profiles import Profile
from .results import Cell
from .ways import SBP, TRUTH, WAYS, WITHOUT


def cells_of(profile: Profile) -> Iterator[Cell]:
    """Model by model: first the trainings under the largest budget, seed by seed, then steps under the
    other budgets."""
    *smaller, largest = profile.budget_bytes
    for training in profile.trainings:
        for batch in profile.batches:
            for seed in profile.seeds:
                for way in WAYS:
                    budget = 0 if way == TRUTH else largest
                    yield Cell(training.model, batch, way, budget, seed, trained=True)
        for budget in smaller:
            for batch in profile.batches:
                for way in (WITHOUT, SBP):
                    yield Cell(training.model, batch, way, budget, profile.seeds[0], trained=False)
