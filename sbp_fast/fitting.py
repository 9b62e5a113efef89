"""How a step fits into memory: how much is computed at once, what becomes of activations, the budget."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .activations import Activations, Automatic
from .batches import MicroBatch, whole_of
from .memory.out_of_memory import NothingSmallerError
from .memory.step_budget import StepBudget
from .result import StepResult

if TYPE_CHECKING:
    from .planning.automatic import AutomaticSize


class Fitting:
    """What was asked for, or what a plan says, for the large batches of one accumulator on one device.

    Args:
        modules: of the step, the model first.
        loss_fn, optimizer: of the accumulator.
        device: of the step.
        budget: bytes of device memory; None for what there is.
        wanted: how much is computed at once, in samples or by their cost; None for what a plan says.
        has_cost: it is by their cost, of which plans know nothing.
        activations: of the accumulator.
        plan_options: of the accumulator, by name.

    Attributes:
        wanted: as given.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        loss_fn: Callable[..., Any] | None,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        budget: int | None,
        wanted: int | None,
        has_cost: bool,
        activations: Activations,
        plan_options: Mapping[str, Any],
    ) -> None:
        self._modules, self._loss_fn, self._optimizer = modules, loss_fn, optimizer
        self._device = device
        self._limit = budget
        self._budget = None if budget is None else StepBudget(device, budget)
        self.wanted = wanted
        self._activations = activations
        self._plan_options = plan_options
        # On a CPU without a budget, and where samples differ in cost, all activations are kept.
        is_bounded = budget is not None or device.type == "cuda"
        chooses = is_bounded and isinstance(activations, Automatic) and not has_cost
        self._is_planned = wanted is None or chooses
        self._plans: AutomaticSize | None = None

    def size_for(self, whole: MicroBatch) -> int:
        """How much of it is computed at once; what becomes of activations is decided with it.

        Args:
            whole: the large batch, or one item of its stream.

        Raises:
            BudgetError: a ValueError; not even one sample fits.
        """
        if self.wanted is None or self._is_planned:
            return self._automatic().size_for(whole)
        return self.wanted

    @contextmanager
    def within_budget(self, micro_batches: Iterable[MicroBatch]) -> Iterator[None]:
        """While inside, more than the budget is out of memory; the error says which would do."""
        if self._budget is None:
            yield
            return
        try:
            with self._budget.holding(self._modules, self._optimizer):
                yield
        except torch.OutOfMemoryError as error:
            whole = whole_of(micro_batches)
            if whole is None:
                raise
            raise NothingSmallerError(f"{error}{self._automatic().advice(whole)}") from error

    def learn_from(self, result: StepResult) -> None:
        """Plans are corrected by what a step was measured to need."""
        if self._plans is not None:
            self._plans.learn_from(result)

    def _automatic(self) -> AutomaticSize:
        # Here, since plans are made by accumulators.
        from .planning.automatic import AutomaticSize

        if self._plans is None:
            self._plans = AutomaticSize(
                *(self._modules[0], self._loss_fn, self._optimizer, self._device),
                *(self._limit, self.wanted, self._activations, self._plan_options),
            )
        return self._plans
