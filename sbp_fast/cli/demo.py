"""``sbp-fast demo``: train a ResNet on real images with a batch that does not fit in the budget."""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from .. import StreamedAccumulator
from ..data import FashionMnist, load_fashion_mnist
from ..memory import format_bytes, keep_freed_pages, memory_budget, parse_bytes
from ..report.extra import import_extra
from ..report.plot import MemoryBar, TrainingCurve, save_figure
from ..report.table import format_table
from .demo_measure import (
    Batch,
    PlainRun,
    accuracy_on,
    gradient_difference,
    large_batches,
    make_optimizer,
    run_plain,
    synchronize,
)
from .demo_model import ResNet

LEARNING_RATE = 0.003
WARM_UP = 0.25
EVALUATIONS = 6
# The gradients are compared on a batch that the plain step can afford, in uneven pieces.
COMPARED_IMAGES = 64
COMPARED_MICRO_BATCH = 24
NOT_MEASURED = "-"


@dataclass(frozen=True)
class Trained:
    """What training with SBP gave; ``accuracy`` is the last of the curve.

    ``waiting_bytes``: of host memory, for the backward pass through batch norm.
    """

    curve: TrainingCurve
    micro_batch_size: int
    peak_bytes: int
    waiting_bytes: int
    samples_per_second: float

    @property
    def accuracy(self) -> float:
        return self.curve.accuracies[-1]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch-size", type=positive, default=1024, help="images in a large batch")
    parser.add_argument(
        "--micro-batch-size", type=positive, default=128, help="images computed at once by SBP"
    )
    parser.add_argument("--budget", default="96MiB", help="device memory, such as 96MiB or 1GB")
    parser.add_argument("--steps", type=positive, default=50, help="optimizer steps")
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="where the model lives",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("sbp_fast_demo.png"), help="the figure (PNG)"
    )
    parser.add_argument(
        "--data",
        type=Path,
        help="directory of the four original Fashion-MNIST files; None: where they are installed, "
        "else the slice shipped with sbp_fast",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the order")


def positive(text: str) -> int:
    """An integer >= 1 from the command line."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a whole number >= 1")
    return int(text)


def run(arguments: argparse.Namespace) -> int:
    """Runs the demo. Exit status 2, with one line on stderr, for an argument that cannot be used."""
    # Everything that can be wrong is looked at before the minutes of training.
    try:
        budget_bytes = parse_bytes(arguments.budget)
        data = load_fashion_mnist(arguments.data)
        check(arguments, data)
    except (ImportError, OSError, ValueError) as error:
        print(f"sbp-fast demo: {error}", file=sys.stderr)
        return 2

    keep_freed_pages()
    torch.manual_seed(arguments.seed)
    device = torch.device(arguments.device)
    # Convolutions on the CPU are about a third faster in this layout.
    model = ResNet().to(device)
    nn.utils.convert_conv2d_weight_memory_format(model, torch.channels_last)
    loss_fn = nn.CrossEntropyLoss()
    batches = large_batches(
        data.train_images, data.train_labels, arguments.batch_size, arguments.seed
    )
    batch = next(batches)
    print(f"Data    {data.describe()}")
    print(f"Model   ResNet, {sum(p.numel() for p in model.parameters()):,} parameters, on {device}")
    print(f"Budget  {format_bytes(budget_bytes)} of device memory")

    print(f"\n1. The plain step, all {arguments.batch_size} images at once, under the budget:")
    plain = run_plain(model, loss_fn, [batch], LEARNING_RATE, budget_bytes)
    if plain.error is None:
        print(f"   It fits ({format_bytes(plain.peak_bytes)}): try a smaller --budget.")
    else:
        print(f"   torch.OutOfMemoryError: {plain.error}")
    print("   Without a budget, for comparison (the second of two steps):")
    free = run_plain(model, loss_fn, [batch, batch], LEARNING_RATE, None)
    print(f"   {free.error or f'peak {format_bytes(free.peak_bytes)}'}")

    compared = (batch[0][:COMPARED_IMAGES], batch[1][:COMPARED_IMAGES])
    exact, by_micro_batch = (
        gradient_difference(model, loss_fn, compared, COMPARED_MICRO_BATCH, batch_norm)
        for batch_norm in ("exact", "micro_batch")
    )
    print(
        f"\n2. The same gradient: |SBP - plain| / |plain| = {exact:.1e} "
        f"({len(compared[1])} images, in micro-batches of {COMPARED_MICRO_BATCH}, float64)\n"
        f"   With batch norm by micro-batch, as in plain accumulation: {by_micro_batch:.1e}"
    )

    print(f"\n3. SBP under the budget, in micro-batches of {arguments.micro_batch_size}:")
    try:
        trained = train(
            model, loss_fn, itertools.chain([batch], batches), data, arguments, budget_bytes
        )
    except torch.OutOfMemoryError as error:
        print(f"   torch.OutOfMemoryError: {error}\n   Try a larger --budget.")
        return 1

    print(f"\n{results_table(arguments, budget_bytes, plain, free, trained)}")
    save_figure(
        arguments.output,
        f"ResNet on Fashion-MNIST, batch {arguments.batch_size}, {device.type.upper()}",
        memory_bars(arguments, free, trained),
        budget_bytes,
        trained.curve,
    )
    print(f"\nFigure: {arguments.output}")
    return 0


def check(arguments: argparse.Namespace, data: FashionMnist) -> None:
    """Raises ValueError, ImportError or OSError for what would fail only after the training."""
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda, but torch sees no CUDA device; use --device cpu")
    memory_budget(arguments.device, arguments.budget)
    if arguments.batch_size > len(data.train_labels):
        raise ValueError(
            f"--batch-size {arguments.batch_size}, expected at most the "
            f"{len(data.train_labels)} training images"
        )
    if not arguments.output.absolute().parent.is_dir():
        raise FileNotFoundError(
            f"--output {arguments.output}: there is no directory {arguments.output.parent}; "
            "create it or name another"
        )
    import_extra("matplotlib")
    import_extra("tqdm")


def train(
    model: nn.Module,
    loss_fn: nn.Module,
    batches: Iterator[Batch],
    data: FashionMnist,
    arguments: argparse.Namespace,
    budget_bytes: int,
) -> Trained:
    """Trains ``model`` in place with SBP under the budget; prints a progress bar over the steps."""
    device = next(model.parameters()).device
    optimizer = make_optimizer(model, LEARNING_RATE)
    accumulator = StreamedAccumulator(
        model, optimizer, loss_fn, micro_batch_size=arguments.micro_batch_size
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: warm_up_cosine(step, arguments.steps)
    )
    evaluate_after = evaluation_steps(arguments.steps)
    losses: list[float] = []
    accuracies: list[float] = []
    seconds, samples, peak_bytes, waiting_bytes = 0.0, 0, 0, 0
    memory = memory_budget(device, budget_bytes)
    memory.track(model.parameters())
    bar = import_extra("tqdm").tqdm(total=arguments.steps, unit="step", file=sys.stdout)
    with bar:
        for step, (images, labels) in zip(range(1, arguments.steps + 1), batches, strict=False):
            start = time.perf_counter()
            with memory:
                result = accumulator.step(images, labels)
            losses.append(float(result.loss))
            synchronize(device)
            seconds += time.perf_counter() - start
            samples += result.samples
            # Read after every step: on CUDA a step starts a new peak.
            peak_bytes = max(peak_bytes, memory.peak_bytes)
            waiting_bytes = max(waiting_bytes, result.host_bytes)
            schedule.step()
            if step in evaluate_after:
                accuracies.append(
                    accuracy_on(
                        model, data.test_images, data.test_labels, arguments.micro_batch_size
                    )
                )
            bar.set_postfix(loss=f"{losses[-1]:.3f}", samples_per_s=f"{samples / seconds:.0f}")
            bar.update()
    curve = TrainingCurve(losses, evaluate_after, accuracies)
    return Trained(curve, result.micro_batch_size, peak_bytes, waiting_bytes, samples / seconds)


def warm_up_cosine(step: int, steps: int) -> float:
    """The learning rate's factor: up in a line over the first steps, then down in half a cosine.

    ``step`` counts from 0 to ``steps``; the factor is in 0..1 and above 0 in every step made.
    """
    warm_up = max(round(WARM_UP * steps), 1)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up + 1) / (steps - warm_up + 1)))


def evaluation_steps(steps: int) -> list[int]:
    """After which steps the test accuracy is measured: evenly spread, the last one included."""
    return sorted({math.ceil(steps * i / EVALUATIONS) for i in range(1, EVALUATIONS + 1)})


def results_table(
    arguments: argparse.Namespace,
    budget_bytes: int,
    plain: PlainRun,
    free: PlainRun,
    trained: Trained,
) -> str:
    """The table at the end: one row for each way to do the step."""
    batch = str(arguments.batch_size)
    budget = format_bytes(budget_bytes)
    return format_table(
        (
            *("step", "batch", "micro-batch"),
            *("peak memory", "waits on the host", "samples/s", "test accuracy"),
        ),
        [
            (f"plain, budget {budget}", batch, batch, *plain_cells(plain)),
            ("plain, no budget", batch, batch, *plain_cells(free)),
            (
                f"SBP, budget {budget}",
                batch,
                str(trained.micro_batch_size),
                format_bytes(trained.peak_bytes),
                format_bytes(trained.waiting_bytes),
                f"{trained.samples_per_second:.0f}",
                f"{trained.accuracy:.1%}",
            ),
        ],
    )


def plain_cells(measured: PlainRun) -> tuple[str, str, str, str]:
    """Peak memory, waiting bytes (none), samples per second and accuracy of a plain step, which is not
    trained to the end."""
    if measured.samples_per_second is None:
        return "out of memory", NOT_MEASURED, NOT_MEASURED, NOT_MEASURED
    return (
        format_bytes(measured.peak_bytes),
        NOT_MEASURED,
        f"{measured.samples_per_second:.0f}",
        NOT_MEASURED,
    )


def memory_bars(
    arguments: argparse.Namespace, free: PlainRun, trained: Trained
) -> Sequence[MemoryBar]:
    """The plain step's bar, where it could be measured, and SBP's."""
    streamed = MemoryBar(f"SBP\nmicro-batch {trained.micro_batch_size}", trained.peak_bytes)
    if free.error is not None:
        return [streamed]
    return [MemoryBar(f"plain step\nbatch {arguments.batch_size}", free.peak_bytes), streamed]
