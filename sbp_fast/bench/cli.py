"""``sbp-fast bench``: runs the cases, prints tables, writes CSV, plots and the environment."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..memory import keep_freed_pages
from . import (
    activation_policies,
    batch_norm,
    dropout,
    environment,
    exact,
    goals,
    kernels,
    plots,
    step,
    streaming,
)
from .activations import Activation
from .case import Case
from .memory import memory_table, write_memory
from .rows import Row, as_table, write_csv
from .shapes import resnet50_shapes
from .step import StepSize
from .streaming import StreamSize
from .timing import stopwatch_for

SUBJECTS = ("kernels", "batch_norm", "dropout", "step", "exact", "activations", "streaming")


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        networks: how many times the shapes of ResNet-50 (25.6 M elements) are in the lists.
        ceiling_elements: of each array of the ceiling.
        kernel_rounds, step_rounds: measurements of each contender; layers have those of kernels.
        activations: of the layers.
        sizes: of the steps.
        exact_sizes: of the steps with exact batch norm.
        exact_rounds: measurements of each of those.
        policy_sizes: of the steps in which activations are kept, recomputed and offloaded.
        policy_rounds: measurements of each of those.
        stream_sizes: of the steps on rows out of a file.
    """

    networks: int
    ceiling_elements: int
    kernel_rounds: int
    step_rounds: int
    activations: Sequence[Activation]
    sizes: Sequence[StepSize]
    exact_sizes: Sequence[StepSize]
    exact_rounds: int
    policy_sizes: Sequence[StepSize]
    policy_rounds: int
    stream_sizes: Sequence[StreamSize]


_MICRO_BATCHES = (1, 2, 4, 8, 16)

FULL = Plan(
    networks=4,
    ceiling_elements=50_000_000,
    kernel_rounds=31,
    step_rounds=21,
    # Of ResNet-50's second stage: eight images of 64 x 64, which stay in the caches, and 32 of 224 x 224,
    # which do not.
    activations=[(8, 256, 16, 16), (32, 256, 56, 56)],
    sizes=[
        StepSize(pixels, batch, micro_batch)
        for pixels, batch in ((32, 16), (32, 32), (64, 16))
        for micro_batch in _MICRO_BATCHES
    ],
    exact_sizes=[StepSize(64, 64, micro_batch) for micro_batch in (4, 8, 16)],
    exact_rounds=7,
    policy_sizes=[StepSize(64, 64, 32)],
    policy_rounds=7,
    # Gathering takes less than computing in the first, and about as long in the second.
    stream_sizes=[StreamSize(4096, 64 * 1024, 512, 64, hidden) for hidden in (512, 64)],
)
QUICK = Plan(
    networks=1,
    ceiling_elements=25_000_000,
    kernel_rounds=5,
    step_rounds=5,
    activations=[(8, 256, 16, 16)],
    sizes=[StepSize(32, 16, micro_batch) for micro_batch in (1, 4, 16)],
    exact_sizes=[StepSize(64, 16, 8)],
    exact_rounds=3,
    policy_sizes=[StepSize(32, 8, 4)],
    policy_rounds=3,
    stream_sizes=[StreamSize(1024, 16 * 1024, 128, 32, 128)],
)

_STEP_WIDTH = 64

# Benchmarks whose question is how long a caller waits, not how long a kernel runs.
_HOST_COUNTS = ("overhead", "step", "exact", "activations", "streaming")

# Load average above which others are at work. Those who start the benchmark leave some load themselves.
_MOST_LOAD = 0.7


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="where CSV, plots, goals and environment go; left out: benchmarks/results/<device>",
    )
    parser.add_argument("--quick", action="store_true", help="small and few: a minute on two cores")
    parser.add_argument("--only", choices=SUBJECTS, help="measure this alone; left out: all")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="left out: cuda where there is one, else cpu"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads; left out: torch's")


def run(arguments: argparse.Namespace) -> int:
    """Runs what the arguments ask for; 0 unless they cannot be satisfied."""
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print(
            "--device cuda: torch sees no CUDA device; check `nvidia-smi`, or leave --device out to "
            "measure the CPU"
        )
        return 2
    if arguments.threads is not None:
        if arguments.threads < 1:
            print(f"--threads is {arguments.threads}; it must be at least 1")
            return 2
        torch.set_num_threads(arguments.threads)
    name = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    output = arguments.output or Path("benchmarks", "results", environment.slug(device))
    # Page faults would be a good part of every step on the CPU, whoever makes it.
    keep_freed_pages()
    subjects = SUBJECTS if arguments.only is None else (arguments.only,)
    bench(device, QUICK if arguments.quick else FULL, output, subjects)
    return 0


def bench(
    device: torch.device,
    plan: Plan,
    output: Path,
    subjects: Sequence[str] = SUBJECTS,
    *,
    step_width: int = _STEP_WIDTH,
) -> list[Row]:
    """Measures, prints, and writes CSV, plots, goals and environment to ``output``.

    Every file belongs to one subject, so that subjects measured in different runs can share a folder.
    """
    output.mkdir(parents=True, exist_ok=True)
    # First, so that the load of the machine is that before the measurement.
    for subject in subjects:
        environment.write(output / f"{subject}_environment.json", device)
    print(f"{environment.device_name(device)}, {torch.get_num_threads()} threads")
    if environment.load_average() > _MOST_LOAD:
        print(
            f"warning: the machine was busy (load average {environment.load_average():.1f}); figures "
            "are worth little unless it does nothing else"
        )
    rows: list[Row] = []
    if "kernels" in subjects:
        shapes = resnet50_shapes() * plan.networks
        makers = kernels.cases(shapes, device, plan.ceiling_elements)
        rows += _measure("kernels", makers, plan.kernel_rounds, device, output)
    for subject, layer in (("batch_norm", batch_norm), ("dropout", dropout)):
        if subject in subjects:
            makers = layer.cases(plan.activations, device)
            rows += _measure(subject, makers, plan.kernel_rounds, device, output)
    if "step" in subjects:
        makers = step.cases(plan.sizes, device, step_width)
        rows += _measure("step", makers, plan.step_rounds, device, output)
    for subject, steps, sizes, rounds in (
        ("exact", exact, plan.exact_sizes, plan.exact_rounds),
        ("activations", activation_policies, plan.policy_sizes, plan.policy_rounds),
    ):
        if subject in subjects:
            rows += _measure(
                subject, steps.cases(sizes, device, step_width), rounds, device, output
            )
            memory = [
                row for size in sizes for row in steps.measure_memory(size, device, step_width)
            ]
            print(f"\n{memory_table(memory)}")
            write_memory(output / f"{subject}_memory.csv", memory)
    if "streaming" in subjects:
        makers = streaming.cases(plan.stream_sizes, device)
        rows += _measure("streaming", makers, plan.step_rounds, device, output)
    verdicts = goals.report(rows)
    if verdicts:
        print(f"\n{verdicts}")
    print(f"\nwritten to {output}")
    return rows


def _measure(
    subject: str,
    makers: Sequence[Callable[[], Case]],
    rounds: int,
    device: torch.device,
    output: Path,
) -> list[Row]:
    rows: list[Row] = []
    for make in makers:
        case = make()
        stopwatch = stopwatch_for(device, host_counts=case.benchmark in _HOST_COUNTS)
        new = case.measure(device, rounds, stopwatch)
        print(f"\n{as_table(new)}", flush=True)
        rows += new
    write_csv(output / f"{subject}.csv", rows)
    verdicts = goals.report(rows)
    if verdicts:
        (output / f"{subject}_goals.txt").write_text(verdicts + "\n")
    without_plot = dict.fromkeys(("exact", "activations", "streaming"))
    draw = {**without_plot, "step": plots.draw_step}.get(subject, plots.draw_bandwidth)
    if draw is None:
        return rows
    try:
        draw(rows, output / f"{subject}.png")
    except plots.PlottingUnavailableError as reason:
        print(f"no plot: {reason}")
    return rows
