"""``python -m benchmarks.paper``: measures, and writes CSV, environment, plots and reports."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from sbp_fast.bench import environment
from sbp_fast.memory import keep_freed_pages

from . import plots, reports
from .data import CLASSIFICATION, SEGMENTATION, Dataset, load
from .data.registry import CLASSIFICATION_FLAG, SEGMENTATION_FLAG
from .evaluate import ENVIRONMENT, evaluate
from .extra import import_bench
from .models import CLASSIFICATION as CLASSIFIES
from .models import SEGMENTATION as SEGMENTS
from .profiles import PROFILES, Profile

_DEFAULT_CACHE = Path.home() / ".cache" / "sbp_fast" / "paper"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m benchmarks.paper", description=__doc__)
    made.add_argument(
        "--profile",
        choices=list(PROFILES),
        default="small",
        help="small: reduced models, for two cores; full: for a GPU; tiny: a check that it runs",
    )
    made.add_argument(
        "--classification", choices=sorted(CLASSIFICATION), help="left out: the profile's"
    )
    made.add_argument(CLASSIFICATION_FLAG, type=Path, metavar="FOLDER", help="its files")
    made.add_argument(
        "--segmentation", choices=sorted(SEGMENTATION), help="left out: the profile's"
    )
    made.add_argument(SEGMENTATION_FLAG, type=Path, metavar="FOLDER", help="its files")
    made.add_argument(
        "--skip-damaged",
        action="store_true",
        help="leave out and count samples that cannot be read",
    )
    made.add_argument(
        "--cache",
        type=Path,
        default=_DEFAULT_CACHE,
        metavar="FOLDER",
        help="where decoded images are kept (default: %(default)s)",
    )
    made.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="results; a run that was stopped goes on there (left out: benchmarks/results/<device>/"
        "paper-<profile>)",
    )
    made.add_argument(
        "--device", choices=("cpu", "cuda"), help="left out: cuda where there is one, else cpu"
    )
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 2, with one line on stderr, for what cannot be measured."""
    chosen = parser().parse_args(arguments)
    profile = PROFILES[chosen.profile]
    device = torch.device(chosen.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    output = chosen.output or Path(
        "benchmarks", "results", environment.slug(device), f"paper-{profile.name}"
    )
    try:
        # What is missing is missed before hours of work.
        for name in ("tqdm", "matplotlib"):
            import_bench(name, name)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda, but torch sees no CUDA device; use --device cpu")
        datasets = _datasets(profile, chosen)
        keep_freed_pages()
        rows = evaluate(profile, datasets, device, output)
    except (ImportError, OSError, ValueError) as error:
        print(f"benchmarks.paper: {error}", file=sys.stderr)
        return 2
    run = json.loads((output / ENVIRONMENT).read_text())
    reports.write(reports.report_of(profile, rows, run, plots.draw(profile, rows, output)), output)
    print(f"{output / reports.MARKDOWN}\n{output / reports.HTML}")
    return 0


def _datasets(profile: Profile, chosen: argparse.Namespace) -> dict[str, Dataset]:
    names = {
        CLASSIFIES: (chosen.classification or profile.classification, chosen.classification_folder),
        SEGMENTS: (chosen.segmentation or profile.segmentation, chosen.segmentation_folder),
    }
    datasets = {
        task: load(*(name, folder, chosen.cache, profile.pixels), skip_damaged=chosen.skip_damaged)
        for task, (name, folder) in names.items()
    }
    for dataset in datasets.values():
        print(dataset.describe(), file=sys.stderr)
        if len(dataset.train) < max(profile.batches):
            raise ValueError(
                f"{dataset.name} has {len(dataset.train)} images to train with, and profile "
                f"{profile.name} a batch of {max(profile.batches)}; choose a larger data set or a "
                "smaller profile"
            )
    return datasets


if __name__ == "__main__":
    sys.exit(main())
