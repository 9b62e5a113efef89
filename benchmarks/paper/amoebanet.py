"""AmoebaNet-D, the network of an evolutionary search.

Sources: Real, Aggarwal, Huang, Le, "Regularized Evolution for Image Classifier Architecture Search",
AAAI 2019 (arXiv 1802.01548), appendix D, for the cells; the authors' own implementation (TensorFlow,
``tpu/models/official/amoeba_net``) where it says more than the figure; Huang et al., "GPipe", NeurIPS
2019 (arXiv 1811.06965), table 1, for the numbers of parameters.

What the authors add for ImageNet's long training is left out: the auxiliary head, and dropout of paths
and before the last layer, whose masks for a large batch and for its parts would differ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

# The authors' own; torch's is 1e-5.
_EPSILON = 1e-3


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=_EPSILON)


def _relu_convolution(
    inputs: int,
    outputs: int,
    kernel: int | tuple[int, int] = 1,
    stride: int | tuple[int, int] = 1,
) -> list[nn.Module]:
    """ReLU, convolution, batch norm; padded so that a stride of 1 keeps height and width."""
    height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
    padding = (height // 2, width // 2)
    return [
        nn.ReLU(),
        nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False),
        _norm(outputs),
    ]


class FactorizedReduction(nn.Module):
    """Halves height and width, with every second pixel in one half of the channels and those right below
    them in the other: [N, inputs, H, W] to [N, outputs, ceil(H / 2), ceil(W / 2)]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.even = nn.Conv2d(inputs, outputs // 2, 1, 2, bias=False)
        self.odd = nn.Conv2d(inputs, outputs - outputs // 2, 1, 2, bias=False)
        self.norm = _norm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(x)
        shifted = nn.functional.pad(x, (0, 1, 0, 1))[:, :, 1:, 1:]
        y: Tensor = self.norm(torch.cat([self.even(x), self.odd(shifted)], 1))
        return y


def _identity(channels: int, stride: int) -> nn.Module:
    # In these cells it only ever sees what has the output's size.
    return nn.Identity()


def _point(channels: int, stride: int) -> nn.Module:
    return nn.Sequential(*_relu_convolution(channels, channels, 1, stride))


def _square(channels: int, stride: int) -> nn.Module:
    """3 x 3, at a quarter of the width."""
    narrow = channels // 4
    return nn.Sequential(
        *_relu_convolution(channels, narrow),
        *_relu_convolution(narrow, narrow, 3, stride),
        *_relu_convolution(narrow, channels),
    )


def _cross(channels: int, stride: int) -> nn.Module:
    """1 x 7, then 7 x 1, at a quarter of the width."""
    narrow = channels // 4
    return nn.Sequential(
        *_relu_convolution(channels, narrow),
        *_relu_convolution(narrow, narrow, (1, 7), (1, stride)),
        *_relu_convolution(narrow, narrow, (7, 1), (stride, 1)),
        *_relu_convolution(narrow, channels),
    )


def _mean_3(channels: int, stride: int) -> nn.Module:
    return nn.AvgPool2d(3, stride, 1, count_include_pad=False)


def _max_3(channels: int, stride: int) -> nn.Module:
    return nn.MaxPool2d(3, stride, 1)


def _max_2(channels: int, stride: int) -> nn.Module:
    # A last row or column alone is a window too, as in the 3 x 3 pools beside it.
    return nn.MaxPool2d(2, stride, ceil_mode=True)


# An operation on the state of that index: 0 is the last cell's output, 1 that of the cell before, 2 to 6
# are the sums of two operations each, in the order of this table.
_Operation = tuple[int, Callable[[int, int], nn.Module]]
_NORMAL: Sequence[_Operation] = (
    *((1, _point), (1, _max_3)),
    *((1, _identity), (0, _cross)),
    *((0, _point), (0, _cross)),
    *((2, _max_3), (2, _identity)),
    *((1, _mean_3), (5, _point)),
)
_REDUCTION: Sequence[_Operation] = (
    *((0, _max_2), (0, _max_3)),
    *((2, _identity), (1, _square)),
    *((2, _cross), (2, _max_3)),
    *((3, _identity), (1, _max_2)),
    *((2, _mean_3), (3, _point)),
)
# The states that are a cell's output, side by side. In a normal cell the paper draws those that no
# operation reads, 4 to 6; the authors' implementation, whose size GPipe's table gives, has these.
_NORMAL_OUTPUT = (0, 3, 4, 6)
_REDUCTION_OUTPUT = (4, 5, 6)


class Cell(nn.Module):
    """Five sums of two operations on the outputs of the last two cells.

    Args:
        before, last: channels of the outputs of the cell before the last and of the last.
        channels: of every state.
        reduces: whether height and width are halved.
        before_is_larger: whether the last cell halved them, so that its input has twice the size of its
            output.
    """

    def __init__(
        self, before: int, last: int, channels: int, *, reduces: bool, before_is_larger: bool
    ) -> None:
        super().__init__()
        self.last = nn.Sequential(*_relu_convolution(last, channels))
        self.before: nn.Module = nn.Identity()
        if before_is_larger:
            self.before = FactorizedReduction(before, channels)
        elif before != channels:
            self.before = nn.Sequential(*_relu_convolution(before, channels))
        operations = _REDUCTION if reduces else _NORMAL
        self.reads = [index for index, _ in operations]
        self.operations = nn.ModuleList(
            make(channels, 2 if reduces and index < 2 else 1) for index, make in operations
        )
        self.output = _REDUCTION_OUTPUT if reduces else _NORMAL_OUTPUT

    def forward(self, before: Tensor, last: Tensor) -> Tensor:
        states = [self.last(last), self.before(before)]
        for left in range(0, len(self.reads), 2):
            first, second = (
                self.operations[place](states[self.reads[place]]) for place in (left, left + 1)
            )
            states.append(first + second)
        return torch.cat([states[index] for index in self.output], 1)


class AmoebaNetD(nn.Module):
    """Images [N, 3, H, W], floating point, to logits [N, classes]. H and W are halved five times.

    Args:
        cells: normal cells, a multiple of 3: a third of them before, between and after the two
            reductions (``L`` of GPipe's AmoebaNet-D (L, D)).
        width: channels of a state in the first third, a multiple of 16 (``D``); doubled at each
            reduction.
        classes: of the images.
        stem: channels of the first convolution.

    Raises:
        ValueError: ``cells`` or ``width`` is no such multiple.
    """

    def __init__(
        self, cells: int = 18, width: int = 208, classes: int = 1000, stem: int = 32
    ) -> None:
        super().__init__()
        if cells < 3 or cells % 3:
            raise ValueError(f"AmoebaNet-D with {cells} cells; expected a multiple of 3: 18, say")
        if width < 16 or width % 16:
            raise ValueError(
                f"AmoebaNet-D with width {width}; expected a multiple of 16, such as 208: the first "
                "states have a quarter of it, and the convolutions between them a quarter of that"
            )
        self.stem = nn.Sequential(nn.Conv2d(3, stem, 3, 2, 1, bias=False), _norm(stem))
        self.cells = nn.ModuleList()
        before = last = stem
        before_is_larger = False

        def add(channels: int, *, reduces: bool) -> None:
            nonlocal before, last, before_is_larger
            cell = Cell(before, last, channels, reduces=reduces, before_is_larger=before_is_larger)
            self.cells.append(cell)
            before, last = last, channels * len(cell.output)
            before_is_larger = reduces

        # 1. Two reductions belong to the stem.
        for channels in (width // 4, width // 2):
            add(channels, reduces=True)
        # 2. Three thirds, a reduction before the second and the third.
        for third in range(3):
            if third:
                add(width << third, reduces=True)
            for _ in range(cells // 3):
                add(width << third, reduces=False)
        self.head = nn.Linear(last, classes)

    def forward(self, images: Tensor) -> Tensor:
        before = last = self.stem(images)
        for cell in self.cells:
            before, last = last, cell(before, last)
        logits: Tensor = self.head(torch.relu(last).mean((2, 3)))
        return logits
