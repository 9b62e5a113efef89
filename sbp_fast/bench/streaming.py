"""Rows by index out of a memory-mapped file, and a step on them: prepared ahead, or when they are needed.

Contenders make the same step on the same rows. They differ in who gathers the next micro-batch: the
prefetcher's thread, the training thread when the micro-batch's turn comes, or a process of torch's
DataLoader. The file is as large as the batch's rows need it and lies in the page cache after the first
round, as a data set does that fits in memory.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset

from ..accumulator import StreamedAccumulator
from ..data.rows import Rows
from .case import Case, Contender
from .step import make_accumulator
from .timing import Call

AHEAD = "prefetcher"
WHEN_NEEDED = "gathered when needed"
LOADER = "DataLoader, one process"


@dataclass(frozen=True)
class StreamSize:
    """Rows in the file, bytes of a float32 row, samples in the large batch and in a micro-batch, and the
    width of the hidden layer, which says how long a micro-batch computes."""

    rows: int
    row_bytes: int
    batch: int
    micro_batch: int
    hidden: int

    @property
    def name(self) -> str:
        return (
            f"rows of {self.row_bytes // 1024} KiB by index, hidden layer {self.hidden}, "
            f"batch {self.batch}, micro-batch {self.micro_batch}"
        )


def cases(sizes: Sequence[StreamSize], device: torch.device) -> list[Callable[[], Case]]:
    """One case per size, yet to be made."""
    return [partial(_case, size, device) for size in sizes]


def _case(size: StreamSize, device: torch.device) -> Case:
    folder = tempfile.TemporaryDirectory(prefix="sbp_fast_bench")
    path = Path(folder.name, "rows.npy")
    columns = size.row_bytes // 4
    generator = np.random.default_rng(0)
    rows = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(size.rows, columns))
    for start in range(0, size.rows, 1024):
        rows[start : start + 1024] = generator.random(rows[start : start + 1024].shape, np.float32)
    rows.flush()
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(columns, size.hidden), nn.ReLU(), nn.Linear(size.hidden, 10)
    ).to(device)
    parameters = list(model.parameters())
    batch = _Batch(path, size)
    return Case(
        benchmark="streaming",
        name=size.name,
        dtype=torch.float32,
        tensors=len(parameters),
        elements=sum(parameter.numel() for parameter in parameters),
        bytes=0,
        contenders=[
            Contender(AHEAD, _ahead(model, batch, folder), {WHEN_NEEDED: "time", LOADER: "time"}),
            Contender(WHEN_NEEDED, _when_needed(model, batch)),
            Contender(LOADER, _loaded(model, batch)),
        ],
    )


class _Batch:
    """Of every round another index, the same for all contenders."""

    def __init__(self, path: Path, size: StreamSize) -> None:
        self.path = path
        self.size = size
        self.labels = torch.randint(0, 10, (size.rows,))

    def mapped(self) -> np.ndarray[Any, Any]:
        mapped: np.ndarray[Any, Any] = np.load(self.path, mmap_mode="r")
        return mapped

    def index(self, round_number: int) -> Tensor:
        generator = torch.Generator().manual_seed(round_number)
        return torch.randint(0, self.size.rows, (self.size.batch,), generator=generator)


def _accumulator(model: nn.Module, batch: _Batch) -> StreamedAccumulator:
    return make_accumulator(copy.deepcopy(model), batch.size.micro_batch, "micro_batch")


def _ahead(model: nn.Module, batch: _Batch, folder: tempfile.TemporaryDirectory[str]) -> Call:
    accumulator, mapped = _accumulator(model, batch), batch.mapped()

    def step(round_number: int) -> None:
        assert folder  # the file's, as long as somebody measures
        index = batch.index(round_number)
        accumulator.step(Rows(mapped, index), batch.labels[index])

    return step


def _when_needed(model: nn.Module, batch: _Batch) -> Call:
    accumulator, mapped = _accumulator(model, batch), batch.mapped()

    def micro_batches(index: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        for part in index.split(batch.size.micro_batch):
            yield torch.from_numpy(mapped[part.numpy()]), batch.labels[part]

    return lambda round_number: accumulator.step(micro_batches(batch.index(round_number)))


class _Samples(Dataset[tuple[Tensor, Tensor]]):
    """Micro-batches by the index of their samples."""

    def __init__(self, batch: _Batch) -> None:
        self._batch = batch
        self._mapped: np.ndarray[Any, Any] | None = None

    def __getitem__(self, part: list[int]) -> tuple[Tensor, Tensor]:
        if self._mapped is None:
            self._mapped = self._batch.mapped()
        return torch.from_numpy(self._mapped[part]), self._batch.labels[part]


def _loaded(model: nn.Module, batch: _Batch) -> Call:
    accumulator = _accumulator(model, batch)
    order: list[int] = []
    loader = DataLoader(
        _Samples(batch),
        sampler=BatchSampler(order, batch.size.micro_batch, drop_last=False),
        batch_size=None,
        num_workers=1,
        # Else every step would start a process.
        persistent_workers=True,
        pin_memory=next(model.parameters()).is_cuda,
    )

    def step(round_number: int) -> None:
        order[:] = batch.index(round_number).tolist()
        accumulator.step(iter(loader))

    return step
