"""How many samples are computed at once: less after out-of-memory, and more again some time later."""

from __future__ import annotations

import logging

_log = logging.getLogger("sbp_fast")

# Steps without any trouble before a larger size is tried again. Twice as many after each failure.
_PATIENCE = 50


class MicroBatchSize:
    """The size that is wanted, and the one that memory allows. Sizes are halved and doubled, so that
    compiled models see few of them.

    Attributes:
        current: samples computed at once.
    """

    def __init__(self, wanted: int) -> None:
        self._wanted = wanted
        self._patience = _PATIENCE
        self._undisturbed = 0
        self.current = wanted

    def want(self, wanted: int) -> None:
        """Another size is wanted from now on; one that memory has allowed less of stays as it is."""
        if self.current == self._wanted:
            self.current = wanted
        else:
            self.current = min(self.current, wanted)
        self._wanted = wanted

    def shrink(self, samples: int, reason: BaseException) -> None:
        """Memory did not suffice for ``samples`` at once."""
        smaller = max(1, (samples + 1) // 2)
        self._undisturbed = 0
        if smaller >= self.current:
            return
        if self.current < self._wanted:
            self._patience *= 2
        _log.warning(
            "micro-batch size %d -> %d: %s", self.current, smaller, str(reason).partition("\n")[0]
        )
        self.current = smaller

    def end_step(self) -> None:
        """A step has gone well."""
        if self.current >= self._wanted:
            return
        self._undisturbed += 1
        if self._undisturbed < self._patience:
            return
        self._undisturbed = 0
        larger = min(2 * self.current, self._wanted)
        _log.info(
            "micro-batch size %d -> %d: no lack of memory for %d steps",
            self.current, larger, self._patience,
        )  # fmt: skip
        self.current = larger
