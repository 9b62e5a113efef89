"""All benchmarks, from a source tree: the same as ``sbp-fast bench``, and takes the same arguments."""

from __future__ import annotations

import argparse
import sys

from sbp_fast.bench import cli

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    cli.add_arguments(parser)
    sys.exit(cli.run(parser.parse_args()))
