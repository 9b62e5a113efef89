"""The optimizer's update: through the scaler where there is one, and undone where that is possible."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.amp.grad_scaler import GradScaler

from .memory.out_of_memory import NothingSmallerError, is_out_of_memory


class Update:
    """One optimizer's updates.

    Args:
        optimizer: reads ``p.grad``.
        scaler: that scaled the loss, or None.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, scaler: GradScaler | None) -> None:
        self._optimizer = optimizer
        self._scaler = scaler

    def make(self) -> None:
        """Updates the parameters.

        Raises:
            NothingSmallerError: memory ran out. The message says whether anything had been updated by
                then; if not, the optimizer's state is as it was.
        """
        with self._undone_if_nothing_changed():
            if self._scaler is None:
                self._optimizer.step()
                return
            with _scaler_kept(self._scaler):
                self._scaler.step(self._optimizer)
                self._scaler.update()

    def show_overflow(self) -> None:
        """Shows the scaler a gradient that is not finite, so that it lowers its scale."""
        if self._scaler is not None:
            with _scaler_kept(self._scaler):
                self._scaler.unscale_(self._optimizer)
                self._scaler.update()

    @contextmanager
    def _undone_if_nothing_changed(self) -> Iterator[None]:
        """Optimizers make the state of a group at its first step, all of it before they use any. Where
        that fails, it goes. What is written to in place cannot be put back."""
        state = self._optimizer.state
        parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        had_state = set(state)
        versions = [parameter._version for parameter in parameters]
        try:
            yield
        except Exception as error:
            # Foreach kernels may write without a trace in versions, but not before the state is whole.
            unchanged = versions == [p._version for p in parameters] and self._was_making_state()
            if unchanged:
                for parameter in set(state) - had_state:
                    del state[parameter]
            if is_out_of_memory(error):
                raise NothingSmallerError(_told(error, unchanged)) from error
            raise

    def _was_making_state(self) -> bool:
        """Whether some parameters of the first group have less of it than others."""
        group = self._optimizer.param_groups[0]["params"]
        entries = [len(self._optimizer.state.get(p, ())) for p in group if p.grad is not None]
        return len(set(entries)) > 1


def _told(error: Exception, unchanged: bool) -> str:
    what = (
        "nothing was updated"
        if unchanged
        else "parameters and their state may have been updated in part: go on from a checkpoint"
    )
    return (
        f"out of memory in the optimizer's step, where a smaller micro-batch does not help; {what}. Let "
        "the optimizer need less (foreach=False, or one with less state), or give it more memory: "
        f"{error}"
    )


@contextmanager
def _scaler_kept(scaler: GradScaler) -> Iterator[None]:
    """A scaler remembers that gradients were unscaled until it is updated. If that never comes, the next
    step would go without."""
    try:
        yield
    except BaseException:
        scaler.update(scaler.get_scale())
        raise
