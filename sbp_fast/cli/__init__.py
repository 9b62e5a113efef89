"""The command ``sbp-fast`` (or ``python -m sbp_fast``)."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from .. import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the command line, runs the command, returns its exit status."""
    # Imported here: `import sbp_fast` must not pay for its commands.
    from ..bench import cli as bench
    from . import advise, demo, doctor, plan, verify

    parser = argparse.ArgumentParser(
        prog="sbp-fast",
        description="Large-batch training on one small device.",
    )
    parser.add_argument("--version", action="version", version=f"sbp_fast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command, help_text in (
        ("doctor", doctor, "say what is built and usable, what is not, why, and what to do"),
        ("plan", plan, "predict how large a micro-batch fits into a memory budget"),
        ("advise", advise, "measure up to which batch size a larger batch saves steps"),
        ("demo", demo, "train a ResNet on real images under a memory budget"),
        (
            "verify",
            verify,
            "certify that a model's gradients do not depend on the micro-batch size",
        ),
        ("bench", bench, "measure the kernels and the step against their peers"),
    ):
        subparser = commands.add_parser(
            name, help=help_text, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run)
    parsed = parser.parse_args(arguments)
    status: int = parsed.run(parsed)
    return status
