"""``sbp-fast advise``: up to which size a larger batch saves steps, for what a function of the user's
returns."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ..batches import count_samples
from ..tuning import Advice, NoiseScale, advise
from ..tuning.measure import measure_noise_scale
from .demo import positive
from .named_function import BadInputError, as_arguments, find_function, importable, split_name
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
    try:
        module, function = split_name(arguments.function)
        with importable(module):
            noise_scale, advice = advice_for(module, function, arguments)
        print(f"{noise_scale}\n{advice}")
    except (
        BadInputError,
        ImportError,
        NotImplementedError,
        OSError,
        TypeError,
        ValueError,
    ) as error:
        print(f"sbp-fast advise: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except Exception as error:
        # Out of the user's code, as a rule, where only its lines tell more.
        traceback.print_exc()
        print(f"sbp-fast advise: ended in {type(error).__name__}, see above", file=sys.stderr)
        return 2
    return 0


def advice_for(
    module: str, function: str, arguments: argparse.Namespace
) -> tuple[NoiseScale, Advice]:
    """Calls the function, and measures what it returns."""
    given = {name: value for name, value in vars(arguments).items() if name in PASSED_ON}
    torch.manual_seed(given.get("seed", 0))
    returned = find_function(module, function)()
    called = as_arguments(returned, f"{module}:{function}", _advice_for, "StreamedAccumulator")
    return _advice_for(**{**called, **given})


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
