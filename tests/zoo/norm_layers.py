"""Batch norm in every form a layer can have: what it is called with, and what it lacks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from .case import CLASSES, SAMPLES, Case, images, labels, seeded

WIDTH = 6


class ConvNet(nn.Module):
    """Two convolutions, each followed by a norm of the kind in question."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, WIDTH, 3, bias=False)
        self.norm1 = norm(WIDTH)
        self.conv2 = nn.Conv2d(WIDTH, WIDTH, 3, stride=2, bias=False)
        self.norm2 = norm(WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.silu(self.norm1(self.conv1(x)))
        x = functional.silu(self.norm2(self.conv2(x)))
        return self.head(x.mean((2, 3)))


def _conv_net(norm: Callable[[int], nn.Module]) -> Case:
    return Case(ConvNet(norm), nn.CrossEntropyLoss(), images(8), labels())


@seeded
def plain() -> Case:
    return _conv_net(nn.BatchNorm2d)


@seeded
def no_affine() -> Case:
    return _conv_net(lambda width: nn.BatchNorm2d(width, affine=False))


@seeded
def no_running_statistics() -> Case:
    return _conv_net(lambda width: nn.BatchNorm2d(width, track_running_stats=False))


@seeded
def no_running_statistics_in_eval_mode() -> Case:
    """Without running statistics, eval mode uses the batch's too."""
    case = _conv_net(lambda width: nn.BatchNorm2d(width, track_running_stats=False))
    case.model.eval()
    return case


@seeded
def cumulative_average() -> Case:
    """``momentum=None``: batch number ``k`` counts ``1 / k``."""
    return _conv_net(lambda width: nn.BatchNorm2d(width, momentum=None))


@seeded
def large_eps_and_momentum() -> Case:
    return _conv_net(lambda width: nn.BatchNorm2d(width, eps=0.3, momentum=0.7))


@seeded
def one_in_eval_mode() -> Case:
    """A frozen backbone: one layer normalises by its running statistics, and keeps them."""
    case = _conv_net(nn.BatchNorm2d)
    case.model.norm1.eval()
    return case


@seeded
def one_frozen() -> Case:
    case = _conv_net(nn.BatchNorm2d)
    case.model.conv1.requires_grad_(False)
    case.model.norm1.eval().requires_grad_(False)
    return case


@seeded
def frozen_affine() -> Case:
    """Weights do not train, statistics go on."""
    case = _conv_net(nn.BatchNorm2d)
    case.model.norm1.requires_grad_(False)
    case.model.norm2.bias.requires_grad_(False)
    return case


@seeded
def frozen_below() -> Case:
    """Nothing before the first norm trains: its input needs no gradient."""
    case = _conv_net(nn.BatchNorm2d)
    case.model.conv1.requires_grad_(False)
    return case


@seeded
def shared_affine() -> Case:
    """Two layers with statistics of their own, and one weight."""
    case = _conv_net(nn.BatchNorm2d)
    case.model.norm2.weight = case.model.norm1.weight
    case.model.norm2.bias = case.model.norm1.bias
    return case


class Softplus(nn.Module):
    def forward(self, raw: Tensor) -> Tensor:
        return functional.softplus(raw)


@seeded
def parametrised() -> Case:
    """The weight that batch norm is called with is computed from another, anew at every access."""
    case = _conv_net(nn.BatchNorm2d)
    for norm in (case.model.norm1, case.model.norm2):
        parametrize.register_parametrization(norm, "weight", Softplus())
    return case


class BatchNormAct2d(nn.BatchNorm2d):
    """Batch norm and activation in one layer, with a forward of its own (as timm's)."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        assert self.training
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        x = functional.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training,
            self.momentum or 0.0,
            self.eps,
        )
        return self.act(x)


@seeded
def fused_activation() -> Case:
    return _conv_net(BatchNormAct2d)


class FunctionalNorm(nn.Module):
    """No batch norm layer at all, only the function; all arguments by keyword."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(width) + 0.5)
        self.register_buffer("running_mean", torch.randn(width) * 0.2)
        self.register_buffer("running_var", torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return functional.batch_norm(
            input=x,
            running_mean=self.running_mean,
            running_var=self.running_var,
            weight=self.gain,
            training=True,
            momentum=0.3,
        )


@seeded
def functional_call() -> Case:
    return _conv_net(FunctionalNorm)


class StatelessNorm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return functional.batch_norm(x, None, None, training=True)


@seeded
def functional_call_without_state() -> Case:
    return _conv_net(lambda width: StatelessNorm())


@seeded
def channels_last() -> Case:
    case = _conv_net(nn.BatchNorm2d)
    case.model.to(memory_format=torch.channels_last)
    return Case(
        case.model,
        case.loss_fn,
        case.inputs.to(memory_format=torch.channels_last),
        case.targets,
    )


class GlobalContext(nn.Module):
    """Batch norm of pooled features, ``(N, C, 1, 1)``: one value of each channel per sample."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, WIDTH, 3, bias=False)
        self.context = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(WIDTH, WIDTH, 1, bias=False), nn.BatchNorm2d(WIDTH)
        )
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.head((x * torch.sigmoid(self.context(x))).mean((2, 3)))


@seeded
def one_by_one() -> Case:
    return Case(GlobalContext(), nn.CrossEntropyLoss(), images(8), labels())


@seeded
def vectors() -> Case:
    """``BatchNorm1d`` on ``(N, C)``: a micro-batch of one sample has no variance of its own."""
    model = nn.Sequential(
        nn.Linear(7, WIDTH, bias=False),
        nn.BatchNorm1d(WIDTH),
        nn.Tanh(),
        nn.Linear(WIDTH, WIDTH, bias=False),
        nn.BatchNorm1d(WIDTH),
        nn.Linear(WIDTH, 1),
    )
    return Case(model, nn.MSELoss(), torch.randn(SAMPLES, 7), torch.randn(SAMPLES, 1))


@seeded
def bias_before_norm() -> Case:
    """Batch norm takes the bias out again: its gradient is zero, but for rounding errors."""
    case = vectors()
    case.model[0] = nn.Linear(7, WIDTH)
    return case


@seeded
def sequences() -> Case:
    """``BatchNorm1d`` on ``(N, C, L)``, which comes transposed from ``(N, L, C)``."""

    class SequenceNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project = nn.Linear(4, WIDTH, bias=False)
            self.norm = nn.BatchNorm1d(WIDTH)
            self.head = nn.Conv1d(WIDTH, CLASSES, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.norm(self.project(x).transpose(1, 2)))).mean(2)

    return Case(SequenceNet(), nn.CrossEntropyLoss(), torch.randn(SAMPLES, 5, 4), labels())


@seeded
def volumes() -> Case:
    model = nn.Sequential(
        nn.Conv3d(2, WIDTH, 2, bias=False),
        nn.BatchNorm3d(WIDTH),
        nn.SiLU(),
        nn.Flatten(2),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(WIDTH, CLASSES),
    )
    return Case(model, nn.CrossEntropyLoss(), torch.randn(SAMPLES, 2, 4, 5, 3), labels())


@seeded
def far_from_zero() -> Case:
    """A mean of many standard deviations: a variance from sums of squares would have no digit left."""
    case = _conv_net(nn.BatchNorm2d)
    case.inputs.add_(15.0)
    return case
