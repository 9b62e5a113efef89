"""What becomes of activations, and how many samples are computed at once: the shortest step that fits.

A step of ``ceil(B / mu)`` micro-batches takes ``ceil(B / mu) * (alpha + beta * mu) * (1 + more)``. Where
activations are kept, ``more`` is 0. Blocks that are computed again add their share of a forward pass, a
third of a step; they are taken in the order of what they save for their time. Offloading adds the time of
copies that computation does not hide; how much that is depends on the machine, so it is taken as long as
the step: the last resort. Without measured times ``alpha`` is taken as a third of the time of
:data:`.choice.ENOUGH_SAMPLES` samples: where micro-batches have that many, larger ones cannot save what
computing all blocks again costs.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate

from torch import nn

from ..activations import Policy
from .block_costs import BlockCost, worth_it
from .choice import (
    ENOUGH_SAMPLES,
    best_micro_batch_size,
    even_sizes,
    relative_step_time,
    time_of_recomputation,
)
from .fake_step import FakeSteps
from .peak import Peak
from .peak_model import PeakModel

_log = logging.getLogger("sbp_fast")

KEEP, RECOMPUTE, OFFLOAD = Policy("keep"), Policy("recompute"), Policy("offload")
_TIME_OF_OFFLOADING = 1.0
# Where lines begin when small tensors stay on the device: at sizes whose tensors are not small.
_LARGE_SIZES = (64, 256)


@dataclass(frozen=True)
class Choice:
    """A way to make the step; as text, ``"micro_batch_size=8 (activations: keep)"``.

    Attributes:
        policy: what becomes of activations.
        micro_batch_size: samples computed at once.
        peak: what it needs.
    """

    policy: Policy
    micro_batch_size: int
    peak: Peak

    def __str__(self) -> str:
        return f"micro_batch_size={self.micro_batch_size} (activations: {self.policy})"


class PolicyPeaks:
    """Peaks under one policy, or under all of them.

    Args:
        steps: on fake tensors.
        batch_size: samples in the large batch.
        activations: ``"keep"``, ``"recompute"``, ``"offload"``, or ``"auto"`` for the choice among them.
    """

    def __init__(self, steps: FakeSteps, batch_size: int, activations: str) -> None:
        self.batch_size = batch_size
        self.is_automatic = activations == "auto"
        self._steps = steps
        self._first = KEEP if self.is_automatic else Policy(activations)
        self._models: dict[Policy, PeakModel] = {}

    def under(self, policy: Policy) -> PeakModel:
        """The peak for every micro-batch size."""
        if policy not in self._models:
            read = partial(self._steps.read, policy)
            waits = self._steps.waits_for_all
            self._models[policy] = (
                PeakModel(self.batch_size, read, waits, _LARGE_SIZES)
                if policy == OFFLOAD
                else PeakModel(self.batch_size, read, waits)
            )
        return self._models[policy]

    @property
    def policies(self) -> list[Policy]:
        """From the one that keeps most to the one that keeps least."""
        if not self.is_automatic:
            return [self._first]
        recompute = [self._all] if self._worth else []
        # Where micro-batches meet, what waits is in host memory already.
        return [KEEP, *recompute, *([] if self._steps.meets else [OFFLOAD])]

    def best(self, budget: int) -> Choice | None:
        """The shortest step within so many bytes, with micro-batches as even as they come; None where
        there is none.

        Activations are kept wherever that leaves micro-batches enough samples, or all.
        """
        # 1. Keep.
        choice = self.largest(self._first, budget)
        enough = min(ENOUGH_SAMPLES, self.batch_size)
        if not self.is_automatic or (choice is not None and choice.micro_batch_size >= enough):
            return choice
        # 2. Or, for every size that fits if all blocks are computed again, those that it needs: as many
        # as seem to be needed, to choose a size, and as are needed for that.
        most = self.largest(self._all, budget) if self._worth else None
        if most is not None:
            sizes = [n for n in even_sizes(self.batch_size) if n <= most.micro_batch_size]
            size = min(sizes, key=lambda size: self._time(self._estimate(size, budget), size))
            if self._is_shorter(self._estimate(size, budget), size, choice):
                choice = self._fewest(size, budget) or most
        # 3. Or offload, unless that is longer even with the whole batch at once.
        if OFFLOAD in self.policies and self._is_shorter(OFFLOAD, self.batch_size, choice):
            other = self.largest(OFFLOAD, budget)
            if other and self._is_shorter(OFFLOAD, other.micro_batch_size, choice):
                choice = other
        return choice

    def best_at(self, size: int, budget: int) -> Choice:
        """The shortest step of this micro-batch size within so many bytes, or where there is none what
        needs the least: offloading, where computing blocks again does not do."""
        kept = self._at(KEEP, size)
        if kept.peak.device_bytes <= budget:
            return kept
        choices = (self._at(policy, size) for policy in self.policies)
        return self._fewest(size, budget) or min(
            choices, key=lambda choice: choice.peak.device_bytes
        )

    def least(self) -> Choice:
        """What needs the least of all."""
        choices = [Choice(policy, *self.under(policy).smallest_peak()) for policy in self.policies]
        return min(choices, key=lambda choice: choice.peak.device_bytes)

    @property
    def writes(self) -> Mapping[nn.Module, bool]:
        """By key, whether a block changes its inputs in place, as far as that was seen."""
        return self._steps.writes()

    def largest(self, policy: Policy, budget: int) -> Choice | None:
        """The fewest micro-batches under this policy within so many bytes, as even as they come."""
        peaks = self.under(policy)
        largest = peaks.largest_within(budget)
        if largest is None:
            return None
        return self._at(policy, best_micro_batch_size(self.batch_size, largest))

    def _fewest(self, size: int, budget: int) -> Choice | None:
        """With as few blocks computed again as there must be: one less would not fit. It is known that
        none does not."""
        most = len(self._worth)
        too_few, enough, best = 0, most + 1, None
        count, step = max(self._estimated_count(size, budget), 1), 1
        while enough - too_few > 1:
            choice = self._at(self._recomputing(count), size)
            if choice.peak.device_bytes <= budget:
                best, enough = choice, count
            else:
                too_few = count
            # From the estimate outwards in growing steps, and then between the nearest on either side.
            if best is None:
                count = min(too_few + step, most)
            elif too_few == 0:
                count = max(enough - step, 1)
            else:
                count = (too_few + enough) // 2
            step *= 2
        return best

    def _estimate(self, size: int, budget: int) -> Policy:
        count = self._estimated_count(size, budget)
        return self._recomputing(count) if count else KEEP

    def _estimated_count(self, size: int, budget: int) -> int:
        """How many blocks must be computed again, if what each saves adds up."""
        missing = self.under(KEEP).predict(size).device_bytes - budget
        saved = (self._costs[key].saved_bytes * size for key in self._worth)
        return min(bisect_left([0, *accumulate(saved)], missing), len(self._worth))

    def _at(self, policy: Policy, size: int) -> Choice:
        return Choice(policy, size, self.under(policy).measure(size))

    def _recomputing(self, count: int) -> Policy:
        """So many blocks, those first that are most worth it."""
        if count == self._steps.blocks:
            return RECOMPUTE
        return Policy("recompute", frozenset(self._worth[:count]), self._steps.blocks)

    @property
    def _all(self) -> Policy:
        return self._recomputing(len(self._worth))

    def _is_shorter(self, policy: Policy, size: int, than: Choice | None) -> bool:
        if than is None:
            return True
        return self._time(policy, size) < self._time(than.policy, than.micro_batch_size)

    def _time(self, policy: Policy, size: int) -> float:
        more = 0.0
        if policy.name == "offload":
            more = _TIME_OF_OFFLOADING
        elif policy.name == "recompute":
            recomputed = policy.recomputed or self._worth
            more = time_of_recomputation(sum(self._costs[key].share for key in recomputed))
        return relative_step_time(self.batch_size, size, more)

    @property
    def _worth(self) -> list[nn.Module]:
        """The blocks that are worth computing again, the best first."""
        return self._looked_at[0]

    @property
    def _costs(self) -> Mapping[nn.Module, BlockCost]:
        return self._looked_at[1]

    @cached_property
    def _looked_at(self) -> tuple[list[nn.Module], Mapping[nn.Module, BlockCost]]:
        """None, and a line in the log, where a model does not allow it."""
        try:
            costs = self._steps.block_costs()
            if costs:
                self._steps.read(RECOMPUTE, 2, 2)
        except Exception as reason:
            _log.info("no block is computed again: %s: %s", type(reason).__name__, reason)
            return [], {}
        return worth_it(costs), costs
