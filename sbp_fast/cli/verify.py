"""``sbp-fast verify``: the equivalence certificate of a model that a function of the user's makes."""

from __future__ import annotations

import argparse
import sys
import traceback
from pathlib import Path

import torch

from .. import Certificate
from .. import verify as make_certificate
from .files import check_directory, check_figure
from .named_function import BadInputError, as_arguments, find_function, importable, split_name

# Passed on where they are given; what they may be, verify and the accumulator say themselves.
PASSED_ON = (
    "micro_batch_sizes",
    "samples",
    "seed",
    "normalization",
    "batch_norm",
    "dropout",
    "cross_sample_loss",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "function",
        metavar="MODULE:FUNCTION",
        help="package.module:function or path/to/file.py:function; it takes no arguments and returns "
        "(model, loss_fn, inputs, targets), or a dict of the arguments of sbp_fast.verify",
    )
    # Left out, each is what the dict says, or else verify's default.
    absent = argparse.SUPPRESS
    parser.add_argument(
        "--micro-batch-sizes", type=sizes, metavar="1,3,8", default=absent, help="in samples"
    )
    parser.add_argument(
        "--samples", type=int, metavar="N", default=absent, help="only the first N of the batch"
    )
    parser.add_argument(
        "--seed", type=int, metavar="N", default=absent, help="of the function and of every run"
    )
    parser.add_argument(
        "--normalization", metavar="NAME", default=absent, help="how the loss averages"
    )
    parser.add_argument("--batch-norm", metavar="NAME", default=absent, help="exact or micro_batch")
    parser.add_argument("--dropout", metavar="NAME", default=absent, help="per_sample or native")
    parser.add_argument(
        "--cross-sample-loss",
        action="store_true",
        default=absent,
        help="the loss compares samples with one another",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the certificate as JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the errors layer by layer")


def sizes(text: str) -> tuple[int, ...]:
    """Whole numbers between commas, from the command line."""
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r}, expected whole numbers between commas, such as 1,3,8"
        ) from None


def run(arguments: argparse.Namespace) -> int:
    """Prints the certificate. Exit status 0 if the promise holds, 1 if not, 2 for bad input."""
    try:
        check_files(arguments)
        module, function = split_name(arguments.function)
        with importable(module):
            certificate = certify(module, function, arguments)
        print(certificate)
        write_files(certificate, arguments)
    except (
        BadInputError,
        ImportError,
        NotImplementedError,
        OSError,
        TypeError,
        ValueError,
    ) as error:
        print(f"sbp-fast verify: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except Exception as error:
        # Out of the user's code, as a rule, where only its lines tell more.
        traceback.print_exc()
        print(f"sbp-fast verify: ended in {type(error).__name__}, see above", file=sys.stderr)
        return 2
    return 0 if certificate.holds else 1


def write_files(certificate: Certificate, arguments: argparse.Namespace) -> None:
    if arguments.json is not None:
        certificate.save(arguments.json)
        print(f"\nCertificate: {arguments.json}")
    if arguments.plot is not None:
        certificate.plot(arguments.plot)
        print(f"\nFigure: {arguments.plot}")


def check_files(arguments: argparse.Namespace) -> None:
    """Raises ImportError, FileNotFoundError or ValueError for what would fail only after the runs."""
    if arguments.json is not None:
        check_directory("--json", arguments.json)
    if arguments.plot is not None:
        check_figure("--plot", arguments.plot)


def certify(module: str, function: str, arguments: argparse.Namespace) -> Certificate:
    """Calls the function, and verifies what it returns."""
    given = {name: value for name, value in vars(arguments).items() if name in PASSED_ON}
    torch.manual_seed(given.get("seed", 0))
    returned = find_function(module, function)()
    called = as_arguments(returned, f"{module}:{function}", make_certificate, "sbp_fast.verify")
    return make_certificate(**{**called, **given})
