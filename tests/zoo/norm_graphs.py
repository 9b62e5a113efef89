"""Batch norm in every place a graph can have: what leads to it, and who reads what it returns."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from .case import CLASSES, Case, images, labels, seeded

WIDTH = 6


def conv(inputs: int = WIDTH, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, WIDTH, 3, stride, padding=1, bias=False)


def _classifier(model: nn.Module) -> Case:
    return Case(model, nn.CrossEntropyLoss(), images(8), labels())


class WithHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3)
        self.head = nn.Linear(WIDTH, CLASSES)

    def features(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(self.stem(images)).mean((2, 3)))


class UsedTwice(WithHead):
    """One layer at two places: two calls, one weight, running statistics that move twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = conv(), nn.BatchNorm2d(WIDTH)

    def features(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = functional.silu(self.norm(self.conv(x)))
        return x


@seeded
def used_twice() -> Case:
    return _classifier(UsedTwice())


class CumulativeUsedTwice(UsedTwice):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(WIDTH, momentum=None)


@seeded
def cumulative_used_twice() -> Case:
    """The second call's momentum differs from the first's."""
    return _classifier(CumulativeUsedTwice())


class TwoBranches(WithHead):
    """Two branches and a sum read what one batch norm returned."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(WIDTH)
        self.left, self.right = conv(), conv()
        self.norm_right = nn.BatchNorm2d(WIDTH)

    def features(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return functional.silu(self.left(x)) * self.norm_right(self.right(x.relu())) + x


@seeded
def two_branches() -> Case:
    return _classifier(TwoBranches())


class OnInput(nn.Module):
    """Raw inputs are normalised: nothing before the layer needs a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(3), conv(3)
        self.norm2 = nn.BatchNorm2d(WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(functional.silu(self.norm2(self.conv(self.norm(x)))).mean((2, 3)))


@seeded
def on_input() -> Case:
    return _classifier(OnInput())


class OnLogits(WithHead):
    """Nothing comes between the last batch norm and the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, CLASSES, bias=False)
        self.norm_logits = nn.BatchNorm1d(CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.norm_logits(self.head(self.stem(images).mean((2, 3))))


@seeded
def on_logits() -> Case:
    return _classifier(OnLogits())


class Parallel(WithHead):
    """Two batch norms of one tensor, whose results meet again."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.BatchNorm2d(WIDTH), nn.BatchNorm2d(WIDTH, eps=0.1)
        self.conv = conv()

    def features(self, x: Tensor) -> Tensor:
        return functional.silu(self.left(x)) * torch.sigmoid(self.right(self.conv(x)) + x)


@seeded
def parallel() -> Case:
    return _classifier(Parallel())


class ReadsNothing(WithHead):
    """One batch norm's result is thrown away: statistics move, and no gradient comes back."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.idle = nn.BatchNorm2d(WIDTH), nn.BatchNorm2d(WIDTH)

    def features(self, x: Tensor) -> Tensor:
        self.idle(x)
        return functional.silu(self.norm(x))


@seeded
def unread() -> Case:
    return _classifier(ReadsNothing())


class PreActivation(WithHead):
    """Each block's input goes to a batch norm and around it (He et al. 2016b)."""

    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(WIDTH), nn.SiLU(inplace=True), conv())
            for _ in range(blocks)
        )
        self.norm = nn.BatchNorm2d(WIDTH)

    def features(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return functional.silu(self.norm(x))


@seeded
def pre_activation() -> Case:
    return _classifier(PreActivation())


class Pyramid(WithHead):
    """The maps of all scales are read again at the end, from the smallest up, with no batch norm in
    between (Lin et al. 2017)."""

    def __init__(self, levels: int = 3) -> None:
        super().__init__()
        self.levels = nn.ModuleList(
            nn.Sequential(conv(stride=2 if level else 1), nn.BatchNorm2d(WIDTH), nn.SiLU())
            for level in range(levels)
        )
        self.lateral = nn.ModuleList(nn.Conv2d(WIDTH, WIDTH, 1) for _ in range(levels))

    def features(self, x: Tensor) -> Tensor:
        maps = []
        for level in self.levels:
            x = level(x)
            maps.append(x)
        top = torch.zeros_like(maps[-1])
        pooled = []
        for feature_map, lateral in zip(reversed(maps), reversed(self.lateral), strict=True):
            top = functional.interpolate(top, feature_map.shape[2:]) + lateral(feature_map)
            pooled.append(top.square().mean((2, 3), keepdim=True))
        return torch.stack(pooled).sum(0)


@seeded
def pyramid() -> Case:
    return _classifier(Pyramid())


class Checkpointed(WithHead):
    """Blocks with batch norm inside are computed again in backward.

    ``recompute=False``: the same without. torch's own batch norm would update its running statistics
    once more in backward, so the oracle is this one.
    """

    def __init__(self, recompute: bool) -> None:
        super().__init__()
        self.recompute = recompute
        self.blocks = nn.ModuleList(
            nn.Sequential(conv(), nn.BatchNorm2d(WIDTH), nn.SiLU(), conv(), nn.BatchNorm2d(WIDTH))
            for _ in range(2)
        )

    def features(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            inner = checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)
            x = functional.silu(x + inner)
        return x


@seeded
def checkpointed() -> Case:
    case = _classifier(Checkpointed(recompute=True))
    return Case(
        case.model, case.loss_fn, case.inputs, case.targets, oracle=Checkpointed(recompute=False)
    )


class MomentumEncoder(nn.Module):
    """One encoder learns to predict what its slow copy sees in another view (Grill et al. 2020). The
    copy's batch norm has the whole batch's statistics as well, without any graph."""

    def __init__(self) -> None:
        super().__init__()
        self.online = nn.Sequential(
            conv(3), nn.BatchNorm2d(WIDTH), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        self.target = copy.deepcopy(self.online).requires_grad_(False)
        self.predictor = nn.Sequential(
            nn.Linear(WIDTH, WIDTH, bias=False),
            nn.BatchNorm1d(WIDTH),
            nn.SiLU(),
            nn.Linear(WIDTH, WIDTH),
        )

    def forward(self, views: Tensor) -> Tensor:
        with torch.no_grad():
            seen = self.target(views[:, 1])
        predicted = self.predictor(self.online(views[:, 0]))
        return functional.normalize(predicted, dim=1) - functional.normalize(seen, dim=1)


@seeded
def momentum_encoder() -> Case:
    views = torch.stack([images(8), images(8)], 1)
    return Case(MomentumEncoder(), nn.MSELoss(), views, torch.zeros(len(views), WIDTH))


class OwnLoss(nn.Module):
    """Returns its own loss, with the labels among its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.model = UsedTwice()

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": functional.cross_entropy(self.model(images), labels)}


@seeded
def own_loss() -> Case:
    inputs = {"images": images(8), "labels": labels()}
    return Case(OwnLoss(), None, inputs, None, normalization="mean")


@seeded
def ignored_samples() -> Case:
    """The first samples' targets do not count, but their values do: in the statistics of all others."""
    case = _classifier(UsedTwice())
    case.targets[:6] = -100
    return case


class Centring(nn.Module):
    """Writes to its inputs, which are the caller's, and goes back through what it wrote."""

    def __init__(self) -> None:
        super().__init__()
        self.model = UsedTwice()
        self.gain = nn.Parameter(torch.rand(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        images -= 0.5
        return self.model(images * self.gain)


@seeded
def inputs_written_to() -> Case:
    return _classifier(Centring())
