"""What the demo measures: the plain step, the agreement of the two gradients, the test accuracy."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import StreamedAccumulator
from ..memory import memory_budget

Batch = tuple[Tensor, Tensor]
LossFunction = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class PlainRun:
    """Peak device memory in bytes, samples per second of the last step, and the error that ended it.

    ``samples_per_second`` is None where ``error`` is not.
    """

    peak_bytes: int
    samples_per_second: float | None
    error: str | None


def make_optimizer(model: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    """The optimizer of the plain and of the split step."""
    return torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)


def large_batches(images: Tensor, labels: Tensor, size: int, seed: int) -> Iterator[Batch]:
    """Endless large batches (images [size, 28, 28], labels [size]) on the host.

    Epoch after epoch, each in a new order; what is left of an epoch, less than a batch, is dropped.
    """
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(labels), generator=generator)
        for start in range(0, len(labels) - size + 1, size):
            chosen = order[start : start + size]
            yield images[chosen], labels[chosen]


def run_plain(
    model: nn.Module,
    loss_fn: LossFunction,
    batches: Iterable[Batch],
    learning_rate: float,
    budget_bytes: int | None,
) -> PlainRun:
    """Plain steps, each with its whole batch at once, on a copy of the model.

    They run under the budget (None: without one) until the batches or the memory run out.
    """
    model = copy.deepcopy(model)
    optimizer = make_optimizer(model, learning_rate)
    device = next(model.parameters()).device
    memory = memory_budget(device, budget_bytes)
    samples_per_second = None
    try:
        memory.track(model.parameters())
        with memory:
            for images, labels in batches:
                start = time.perf_counter()
                loss_fn(model(images.to(device)), labels.to(device)).backward()
                optimizer.step()
                optimizer.zero_grad()
                synchronize(device)
                samples_per_second = len(labels) / (time.perf_counter() - start)
    except torch.OutOfMemoryError as error:
        return PlainRun(memory.peak_bytes, None, str(error))
    return PlainRun(memory.peak_bytes, samples_per_second, None)


def gradient_difference(
    model: nn.Module, loss_fn: LossFunction, batch: Batch, micro_batch_size: int, batch_norm: str
) -> float:
    """|g_sbp - g_plain| / |g_plain|, 2-norms over all parameters, of one batch of uint8 images.

    On copies in float64: in float32 and channels_last, the plain step's batch norm on the CPU is itself
    off by some 1e-3.
    """
    images, labels = batch[0].double() / 255, batch[1]
    plain, streamed = (copy.deepcopy(model).double() for _ in range(2))
    device = next(model.parameters()).device
    loss_fn(plain(images.to(device)), labels.to(device)).backward()
    with warnings.catch_warnings():
        # That batch norm by micro-batch makes a difference is what the demo shows.
        warnings.simplefilter("ignore", UserWarning)
        accumulator = StreamedAccumulator(
            streamed,
            make_optimizer(streamed, 0.0),
            loss_fn,
            micro_batch_size=micro_batch_size,
            batch_norm=batch_norm,
        )
    accumulator.backward(images, labels)
    difference, reference = gradient(streamed) - gradient(plain), gradient(plain)
    return float(difference.norm() / reference.norm())


def gradient(model: nn.Module) -> Tensor:
    """All gradients as one float64 vector."""
    return torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None])


def accuracy_on(model: nn.Module, images: Tensor, labels: Tensor, chunk: int) -> float:
    """The share (0..1) of the images that the model labels rightly, ``chunk`` of them at a time."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    with torch.no_grad():
        right = sum(
            int((model(some.to(device)).argmax(1).cpu() == expected).sum())
            for some, expected in zip(images.split(chunk), labels.split(chunk), strict=True)
        )
    model.train(was_training)
    return right / len(labels)


def synchronize(device: torch.device) -> None:
    """Waits until the device has done what it was given, so that a clock can be read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
