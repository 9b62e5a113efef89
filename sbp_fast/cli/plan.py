"""``sbp-fast plan``: how large a micro-batch of a model fits, that a function of the user's makes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .. import Plan
from .. import plan as make_plan
from ..batches import count_samples
from ..memory import parse_bytes
from ..planning import BudgetError
from .demo import positive
from .files import check_figure
from .named_function import BadInputError
from .users_function import arguments_for, exit_status

# Passed on where they are given; what they may be, plan says itself.
PASSED_ON = (
    *("batch_size", "budget", "device"),
    *("activations", "batch_norm", "dropout", "cross_sample_loss"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "function",
        metavar="MODULE:FUNCTION",
        help="package.module:function or path/to/file.py:function; it takes no arguments and returns "
        "(model, loss_fn, inputs, targets), or a dict of these and of arguments of sbp_fast.plan",
    )
    # Left out, each is what the dict says, or else plan's default.
    absent = argparse.SUPPRESS
    parser.add_argument(
        "--batch-size",
        type=positive,
        metavar="N",
        default=absent,
        help="samples in the large batch; left out: as many as the function returns",
    )
    parser.add_argument(
        "--budget", metavar="SIZE", default=absent, help="device memory, such as 8GiB or 512MB"
    )
    parser.add_argument(
        "--device", metavar="NAME", default=absent, help="cuda or cpu; it need not be there"
    )
    parser.add_argument(
        "--activations",
        metavar="NAME",
        default=absent,
        help="keep, recompute, offload, or auto for a choice among them",
    )
    parser.add_argument("--batch-norm", metavar="NAME", default=absent, help="exact or micro_batch")
    parser.add_argument("--dropout", metavar="NAME", default=absent, help="per_sample or native")
    parser.add_argument(
        "--cross-sample-loss",
        action="store_true",
        default=absent,
        help="the loss compares samples with one another",
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="draw the peak against the micro-batch size"
    )


def run(arguments: argparse.Namespace) -> int:
    """Prints the plan. Exit status 0 if a micro-batch fits, 1 if none does, 2 for bad input."""

    def work() -> int:
        if arguments.output is not None:
            check_figure("--output", arguments.output)
        if "budget" in arguments:
            parse_bytes(arguments.budget)
        try:
            plan = plan_of(arguments)
        except BudgetError as error:
            print(f"sbp-fast plan: {error}", file=sys.stderr)
            return 1
        print(plan)
        if arguments.output is not None:
            plan.save_plot(arguments.output)
            print(f"\nFigure: {arguments.output}")
        return 0

    return exit_status("plan", work)


def plan_of(arguments: argparse.Namespace) -> Plan:
    """Calls the function, and plans for what it returns."""
    with arguments_for(_plan_for, "sbp_fast.plan", arguments, PASSED_ON) as called:
        if "budget" not in called:
            raise BadInputError(
                "there is no budget, neither as --budget nor in what "
                f"{arguments.function} returned; give the device memory that may be used, such as "
                "--budget 8GiB"
            )
        return _plan_for(**called)


def _plan_for(
    model: torch.nn.Module,
    loss_fn: Callable[..., Any] | None,
    inputs: Any,
    targets: Any = None,
    **options: Any,
) -> Plan:
    """The batch in two, as a function returns it for other commands, too."""
    options.setdefault("batch_size", count_samples(inputs, targets))
    sample = inputs if loss_fn is None else (inputs, targets)
    return make_plan(model, loss_fn, sample, **options)
