"""What exact batch norm leaves on the device: nothing that grows with the large batch."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from sbp_fast import StreamedAccumulator
from sbp_fast.memory import memory_budget

WIDTH = 64


class Block(nn.Module):
    """Its shortcut is a batch norm's output, which is only added: autograd does not save it."""

    def __init__(self) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            *(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU()),
            *(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)),
        )
        self.shortcut = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.shortcut(x)
        return torch.relu_(self.residual(x) + shortcut)


def accumulator_for(model: nn.Module, **options: object) -> StreamedAccumulator:
    return StreamedAccumulator(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        nn.CrossEntropyLoss(),
        micro_batch_size=64,
        probe=False,
        **options,  # type: ignore[arg-type]
    )


def peak_of(samples: int) -> int:
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block(), Block(), nn.Linear(WIDTH, 3))
    accumulator = accumulator_for(model)
    inputs, targets = torch.randn(samples, WIDTH), torch.randint(3, (samples,))
    with memory_budget("cpu", None) as memory:
        memory.track(model.parameters())
        for _ in range(2):
            peak = accumulator.step(inputs, targets).peak_bytes
    assert peak is not None
    return peak


def test_peak_does_not_grow_with_the_batch() -> None:
    # 16 times as many micro-batches; a few statistics of each are there.
    assert peak_of(2048) < 1.2 * peak_of(128)


def test_an_output_that_outlives_the_step_is_there(tmp_path: Path) -> None:
    """In a file it had been, as on CUDA in host memory."""

    class Keeping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norms = nn.ModuleList(nn.BatchNorm1d(WIDTH) for _ in range(3))
            self.head = nn.Linear(WIDTH, 3)
            self.kept: dict[float, Tensor] = {}

        def forward(self, x: Tensor) -> Tensor:
            first = self.norms[0](x)
            # By the first of its samples: micro-batches take turns in both directions.
            self.kept[float(x[0, 0])] = first
            return self.head(self.norms[2](torch.tanh(self.norms[1](torch.tanh(first)))))

    torch.manual_seed(0)
    model = Keeping()
    inputs, targets = torch.randn(256, WIDTH), torch.randint(3, (256,))
    result = accumulator_for(model, host_budget=1, spill_directory=tmp_path).backward(
        inputs, targets
    )
    assert result.spilled_bytes > 0
    whole = torch.cat([model.kept[float(first)].detach() for first in inputs[::64, 0]])
    normalised = (inputs - inputs.mean(0)) / (inputs.var(0, correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(whole, normalised, rtol=1e-5, atol=1e-5)
