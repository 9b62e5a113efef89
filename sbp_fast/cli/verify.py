"""``sbp-fast verify``: the equivalence certificate of a model that a function of the user's makes."""

from __future__ import annotations

import argparse
from pathlib import Path

from .. import Certificate
from .. import verify as make_certificate
from .files import check_directory, check_figure
from .users_function import arguments_for, exit_status

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

    def work() -> int:
        check_files(arguments)
        with arguments_for(make_certificate, "sbp_fast.verify", arguments, PASSED_ON) as called:
            certificate = make_certificate(**called)
        print(certificate)
        write_files(certificate, arguments)
        return 0 if certificate.holds else 1

    return exit_status("verify", work)


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
