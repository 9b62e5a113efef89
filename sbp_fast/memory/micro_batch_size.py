"""How much is computed at once: less after out-of-memory, and more again some time later."""

from __future__ import annotations

import logging
import math

_log = logging.getLogger("sbp_fast")

# Steps without any trouble before a larger size is tried again. Twice as many after each failure.
_PATIENCE = 50


class MicroBatchSize:
    """The size that is wanted, and the one that memory allows. Sizes are halved and doubled, so that
    compiled models see few of them.

    Attributes:
        wanted: what would be computed at once with memory for it, in samples or by their cost.
        current: what is.
    """

    def __init__(self, wanted: int) -> None:
        self.wanted = wanted
        self._patience = _PATIENCE
        self._undisturbed = 0
        self.current: float = wanted

    def want(self, wanted: int) -> None:
        """Another size is wanted from now on; one that memory has allowed less of stays as it is."""
        self.current = min(self.current, wanted) if self.is_reduced else wanted
        self.wanted = wanted

    @property
    def is_reduced(self) -> bool:
        """Whether memory allows less than is wanted."""
        return self.current < self.wanted

    def shrink(self, size: float, reason: BaseException) -> None:
        """Memory did not suffice for so much at once."""
        smaller = math.ceil(size / 2) if isinstance(size, int) else size / 2
        self._undisturbed = 0
        if smaller >= self.current:
            return
        if self.is_reduced:
            self._patience *= 2
        _log.warning(
            "micro-batch size %.10g -> %.10g: %s",
            self.current,
            smaller,
            str(reason).partition("\n")[0],
        )
        self.current = smaller

    def end_step(self) -> None:
        """A step has gone well."""
        if not self.is_reduced:
            return
        self._undisturbed += 1
        if self._undisturbed < self._patience:
            return
        self._undisturbed = 0
        larger = min(2 * self.current, self.wanted)
        _log.info(
            "micro-batch size %.10g -> %.10g: no lack of memory for %d steps",
            self.current, larger, self._patience,
        )  # fmt: skip
        self.current = larger
