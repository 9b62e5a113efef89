"""The whole evaluation: every cell that is not measured yet, then the reports."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch

from sbp_fast.bench import environment

from .cells import cells_of
from .data import Dataset
from .extra import import_bench
from .models import MODELS
from .profiles import Profile
from .results import Results, Row
from .run import Runner

CELLS, ENVIRONMENT = "cells.csv", "environment.json"


def evaluate(
    profile: Profile, datasets: Mapping[str, Dataset], device: torch.device, output: Path
) -> list[Row]:
    """Measures what is missing in ``output``, with progress bars on stderr.

    Args:
        datasets: by task, as :attr:`benchmarks.paper.models.Model.task` names them.
        output: a folder, made where it is not there. A killed run goes on where it stopped.

    Returns:
        All rows of the profile's cells, in their order.

    Raises:
        ValueError: ``output`` holds the results of another profile, data set, device or version of torch.
    """
    output.mkdir(parents=True, exist_ok=True)
    _write_environment(profile, datasets, device, output / ENVIRONMENT)
    results = Results(output / CELLS)
    done = {row.cell for row in results.rows}
    cells = list(cells_of(profile))
    progress = import_bench("tqdm", "tqdm").tqdm
    with progress(
        total=len(cells), initial=sum(cell in done for cell in cells), unit="cell", file=sys.stderr
    ) as bar:
        for training in profile.trainings:
            missing = [cell for cell in cells if cell.model == training.model and cell not in done]
            if not missing:
                continue
            bar.set_postfix_str(f"{training.model}, plan")
            with progress(unit="step", leave=False, file=sys.stderr) as steps:
                dataset = datasets[MODELS[training.model].task]
                runner = Runner(profile, training, dataset, device, steps.update)
                for cell in missing:
                    bar.set_postfix_str(f"{cell.model}, batch {cell.batch}, {cell.way}")
                    steps.reset(runner.steps(cell))
                    results.append(runner.run(cell))
                    bar.update()
    rows = {row.cell: row for row in results.rows}
    return [rows[cell] for cell in cells]


def _write_environment(
    profile: Profile, datasets: Mapping[str, Dataset], device: torch.device, path: Path
) -> None:
    """Describes the run; refuses to go on with one that was made elsewhere or with other settings."""
    description = environment.describe(device)
    # As JSON gives it back: lists for tuples.
    settings = json.loads(
        json.dumps(
            {
                **{"profile": asdict(profile), "torch": torch.__version__},
                **{"device": environment.slug(device)},
                "datasets": {task: dataset.describe() for task, dataset in datasets.items()},
            }
        )
    )
    if path.exists():
        before = json.loads(path.read_text())["settings"]
        for name, value in settings.items():
            if before.get(name) != value:
                raise ValueError(
                    f"{path.parent} holds results with another {name}: {before.get(name)}, and now it is "
                    f"{value}; name another folder with --output"
                )
        return
    path.write_text(json.dumps({"settings": settings, "environment": description}, indent=2) + "\n")
