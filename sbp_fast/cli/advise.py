"""``sbp-fast advise``: up to which size a larger batch saves steps, for what a function of the user's
returns."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from ..batches import count_samples
from ..tuning import Advice, NoiseScale, advise
from ..tuning.measure import measure_noise_scale
from .demo import positive
from .users_function import arguments_for, exit_status
from .verify import sizes

# Passed on where they are given.
PASSED_ON = (
    *("batch_size", "micro_batch_size", "batch_sizes", "seed"),
    *("normalization", "batch_norm", "dropout"),
)
# Large batches that the data are split into, unless one's size is given.
STEPS = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "function",
        metavar="MODULE:FUNCTION",
        help="package.module:function or path/to/file.py:function; it takes no arguments and returns "
        "(model, loss_fn, inputs, targets), or a dict of these, of an optimizer that trains meanwhile, "
        "and of arguments of StreamedAccumulator",
    )
    # Left out, each is what the dict says, or else the default.
    absent = argparse.SUPPRESS
    parser.add_argument(
        "--batch-size",
        type=positive,
        metavar="N",
        default=absent,
        help=f"samples in a large batch as it is now; left out: 1/{STEPS} of the data, which come once",
    )
    parser.add_argument(
        "--micro-batch-size",
        type=positive,
        metavar="N",
        default=absent,
        help="samples computed at once; left out: an eighth of a large batch",
    )
    parser.add_argument(
        "--batch-sizes",
        type=sizes,
        metavar="64,256,1024",
        default=absent,
        help="those to be compared; left out: a quarter to sixteen times the batch size",
    )
    parser.add_argument(
        "--seed", type=int, metavar="N", default=absent, help="of the function and of the order"
    )
    parser.add_argument(
        "--normalization", metavar="NAME", default=absent, help="how the loss averages"
    )
    parser.add_argument("--batch-norm", metavar="NAME", default=absent, help="exact or micro_batch")
    parser.add_argument("--dropout", metavar="NAME", default=absent, help="per_sample or native")


def run(arguments: argparse.Namespace) -> int:
    """Prints noise scale and advice. Exit status 0, or 2 for bad input."""

    def work() -> int:
        with arguments_for(_advice_for, "StreamedAccumulator", arguments, PASSED_ON) as called:
            noise_scale, advice = _advice_for(**called)
        print(f"{noise_scale}\n{advice}")
        return 0

    return exit_status("advise", work)


def _advice_for(
    model: nn.Module,
    loss_fn: Callable[..., Any] | None,
    inputs: Any,
    targets: Any = None,
    *,
    batch_size: int | None = None,
    batch_sizes: Sequence[int] | None = None,
    **options: Any,
) -> tuple[NoiseScale, Advice]:
    if batch_size is None:
        batch_size = max(2, count_samples(inputs, targets) // STEPS)
    noise_scale = measure_noise_scale(
        model, loss_fn, inputs, targets, batch_size=batch_size, **options
    )
    return noise_scale, advise(noise_scale, batch_size, batch_sizes)
