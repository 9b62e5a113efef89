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
    alternatives,
    batch_norm,
    dropout,
    environment,
    exact,
    goals,
    growth,
    kernels,
    plots,
    step,
    streaming,
    weight_gradients,
)
from .activations import Activation
from .case import Case
from .image_sizes import StepSize
from .memory import memory_table, write_memory
from .rows import Row, as_table, write_csv
from .shapes import resnet50_shapes
from .streaming import StreamSize
from .timing import stopwatch_for
from .weight_gradients import LayerSize, NetworkSize
from .workloads import NETWORKS, Workload

SUBJECTS = (
    *("kernels", "batch_norm", "dropout", "step", "alternatives", "growth"),
    *("exact", "activations", "weight_gradients", "streaming"),
)


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        networks: how many times the shapes of ResNet-50 (25.6 M elements) are in the lists.
        ceiling_elements: of each array of the ceiling.
        kernel_rounds, step_rounds: measurements of each contender; layers have those of kernels.
        activations: of the layers.
        workloads: of the steps.
        alternatives: of the steps beside those of other tools.
        compiled: networks that are compared under torch.compile as well.
        growth: large batches of one network at one micro-batch size, smallest first.
        growth_rounds: measurements of each of those.
        exact_sizes: of the steps with exact batch norm.
        exact_rounds: measurements of each of those.
        policy_sizes: of the steps in which activations are kept, recomputed and offloaded.
        policy_rounds: measurements of each of those.
        layer_sizes: of the layers whose weight gradients are fused.
        network_sizes: of the steps with such layers.
        stream_sizes: of the steps on rows out of a file.
    """

    networks: int
    ceiling_elements: int
    kernel_rounds: int
    step_rounds: int
    activations: Sequence[Activation]
    workloads: Sequence[Workload]
    alternatives: Sequence[Workload]
    compiled: Sequence[str]
    growth: Sequence[Workload]
    growth_rounds: int
    exact_sizes: Sequence[StepSize]
    exact_rounds: int
    policy_sizes: Sequence[StepSize]
    policy_rounds: int
    layer_sizes: Sequence[LayerSize]
    network_sizes: Sequence[NetworkSize]
    stream_sizes: Sequence[StreamSize]


_BATCH, _MICRO_BATCHES = 16, (1, 2, 4, 16)

FULL = Plan(
    networks=4,
    ceiling_elements=50_000_000,
    kernel_rounds=31,
    step_rounds=9,
    # Of ResNet-50's second stage: eight images of 64 x 64, which stay in the caches, and 32 of 224 x 224,
    # which do not.
    activations=[(8, 256, 16, 16), (32, 256, 56, 56)],
    workloads=[
        Workload(network, dtype, _BATCH, micro_batch)
        for network in NETWORKS
        for dtype in (torch.float32, torch.bfloat16)
        for micro_batch in _MICRO_BATCHES
    ],
    alternatives=[Workload(network, torch.float32, _BATCH, 4) for network in NETWORKS],
    compiled=("ResNet-18", "ViT"),
    growth=[Workload("ResNet-18", torch.float32, batch, 8) for batch in (8, 32, 128, 512, 1024)],
    growth_rounds=5,
    exact_sizes=[StepSize(64, 64, micro_batch) for micro_batch in (4, 8, 16)],
    exact_rounds=7,
    policy_sizes=[StepSize(64, 64, 32)],
    policy_rounds=5,
    layer_sizes=[
        *(
            LayerSize(outputs, inputs, rows)
            for outputs, inputs in ((256, 256), (512, 512), (768, 768), (3072, 768), (4096, 4096))
            for rows in (1, 4, 16, 64, 256)
        ),
        # Of ResNet-50's last stages.
        *(
            LayerSize(outputs, inputs, samples, pixels)
            for outputs, inputs, pixels in ((512, 1024, 14), (2048, 512, 7), (512, 2048, 7))
            for samples in (1, 2, 4, 16)
        ),
    ],
    network_sizes=[
        *(NetworkSize(4096, 16, micro_batch) for micro_batch in (1, 2, 4, 16)),
        *(NetworkSize(384, 16, micro_batch, blocks=6) for micro_batch in (1, 2, 4, 16)),
    ],
    # Gathering takes less than computing in the first, and about as long in the second.
    stream_sizes=[StreamSize(4096, 64 * 1024, 512, 64, hidden) for hidden in (512, 64)],
)
QUICK = Plan(
    networks=1,
    ceiling_elements=25_000_000,
    kernel_rounds=5,
    step_rounds=5,
    activations=[(8, 256, 16, 16)],
    workloads=[Workload("ResNet-18", torch.float32, _BATCH, size) for size in (1, 4, 16)],
    alternatives=[Workload("MLP", torch.float32, _BATCH, 4)],
    compiled=(),
    growth=[Workload("GPT", torch.float32, batch, 4) for batch in (4, 16)],
    growth_rounds=3,
    exact_sizes=[StepSize(64, 16, 8)],
    exact_rounds=3,
    policy_sizes=[StepSize(32, 8, 4)],
    policy_rounds=3,
    layer_sizes=[LayerSize(1024, 1024, 16), LayerSize(512, 2048, 1, pixels=7)],
    network_sizes=[NetworkSize(1024, 8, 2), NetworkSize(384, 8, 4, blocks=2)],
    stream_sizes=[StreamSize(1024, 16 * 1024, 128, 32, 128)],
)

_STEP_WIDTH = 64

# Benchmarks whose question is how long a caller waits, not how long a kernel runs.
_HOST_COUNTS = (
    *("overhead", "step", "alternatives", "exact", "activations", "streaming"),
    *("weight gradients", "weight gradients, step"),
)

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
        makers = step.cases(plan.workloads, device, step_width)
        rows += _measure("step", makers, plan.step_rounds, device, output)
    if "alternatives" in subjects:
        makers = alternatives.cases(plan.alternatives, device, step_width, compiled=plan.compiled)
        rows += _measure("alternatives", makers, plan.step_rounds, device, output)
    if "growth" in subjects:
        _measure_growth(plan, device, output, step_width)
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
    if "weight_gradients" in subjects:
        makers = weight_gradients.cases(plan.layer_sizes, plan.network_sizes, device)
        rows += _measure("weight_gradients", makers, plan.step_rounds, device, output)
    if "streaming" in subjects:
        makers = streaming.cases(plan.stream_sizes, device)
        rows += _measure("streaming", makers, plan.step_rounds, device, output)
    verdicts = goals.report(rows)
    if verdicts:
        print(f"\n{verdicts}")
    print(f"\nwritten to {output}")
    return rows


def _measure_growth(plan: Plan, device: torch.device, output: Path, width: int) -> None:
    grown = growth.measure_growth(plan.growth, plan.growth_rounds, device, width)
    print(f"\n{growth.growth_table(grown)}")
    growth.write(output / "growth.csv", grown)
    overhead = growth.measure_overhead(plan.step_rounds, device)
    print(f"\n{growth.overhead_table(overhead)}", flush=True)
    growth.write(output / "growth_overhead.csv", overhead)
    _draw(lambda: plots.draw_growth(grown, output / "growth.png"))


def _draw(draw: Callable[[], None]) -> None:
    try:
        draw()
    except plots.PlottingUnavailableError as reason:
        print(f"no plot: {reason}")


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
    drawn_by = {
        **dict.fromkeys(("kernels", "batch_norm", "dropout"), plots.draw_bandwidth),
        "step": plots.draw_step,
    }
    if subject in drawn_by:
        _draw(lambda: drawn_by[subject](rows, output / f"{subject}.png"))
    return rows
