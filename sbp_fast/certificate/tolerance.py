"""How much of an error is put down to rounding."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from .distance import Distance

# Relative error of a parameter's gradient, by the dtypes computed in (the design's promise).
USUAL = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 5e-2}

# A deep network, or a device that multiplies float32 with fewer bits, rounds by more than that even where
# nothing is split. So the whole batch is computed at once in the same dtypes, too: its error is rounding
# alone, and another run that rounds differently may have this many times as much.
MARGIN = 4.0

# Unless all of its gradients together are off by more than this. Then it is no rounding: the copy in
# float64 has drawn other random numbers, say.
MOST_ROUNDING = {
    torch.float64: 1e-10,
    torch.float32: 1e-2,
    torch.bfloat16: 0.25,
    torch.float16: 0.25,
}


def usual_tolerance(dtypes: Iterable[torch.dtype]) -> float:
    """Of the coarsest of the dtypes."""
    return max(USUAL[dtype] for dtype in dtypes)


def tolerance_of_each(
    usual: float, at_once: Distance, dtypes: Iterable[torch.dtype]
) -> dict[str, float]:
    """The tolerance of each parameter, where the whole batch at once rounds as much as ``at_once``.

    A small parameter's own rounding may be small by chance, so that of all together counts as well.
    """
    if at_once.total > max(MOST_ROUNDING[dtype] for dtype in dtypes):
        return dict.fromkeys(at_once.of, usual)
    return {
        name: max(usual, MARGIN * max(error, at_once.total)) for name, error in at_once.of.items()
    }
