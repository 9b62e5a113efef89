"""Convolutional nets whose activations are written in place, skipped over or concatenated."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .case import CLASSES, SAMPLES, Case, images, labels, seeded

IGNORED = 255


def double_convolution(inputs: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in (inputs, outputs):
        layers += [
            nn.Conv2d(width, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """Skips from each level down to the same level up, long after (Ronneberger et al. 2015)."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.down = nn.ModuleList(
            [double_convolution(3, width), double_convolution(width, 2 * width)]
        )
        self.bottom = double_convolution(2 * width, 4 * width)
        self.enlarge = nn.ModuleList(
            [
                nn.ConvTranspose2d(4 * width, 2 * width, 2, stride=2),
                nn.ConvTranspose2d(2 * width, width, 2, stride=2),
            ]
        )
        self.up = nn.ModuleList(
            [double_convolution(4 * width, 2 * width), double_convolution(2 * width, width)]
        )
        self.head = nn.Conv2d(width, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for level in self.down:
            x = level(x)
            skips.append(x)
            x = nn.functional.max_pool2d(x, 2)
        x = self.bottom(x)
        for enlarge, level in zip(self.enlarge, self.up, strict=True):
            x = level(torch.cat([skips.pop(), enlarge(x)], 1))
        return self.head(x)


@seeded
def unet() -> Case:
    """Cross entropy of every pixel; samples differ in how many pixels count."""
    targets = torch.randint(CLASSES, (SAMPLES, 16, 16))
    for sample in range(SAMPLES):
        targets[sample, : sample + 1] = IGNORED
    return Case(UNet(), nn.CrossEntropyLoss(ignore_index=IGNORED), images(16), targets)


class DenseNet(nn.Module):
    """Every layer reads the concatenation of all before it (Huang et al. 2017)."""

    def __init__(self, width: int = 8, growth: int = 4, layers: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.blocks = nn.ModuleList()
        for _ in range(2):
            block = nn.ModuleList()
            for _ in range(layers):
                block.append(
                    nn.Sequential(
                        nn.BatchNorm2d(width),
                        nn.ReLU(inplace=True),
                        nn.Conv2d(width, growth, 3, padding=1, bias=False),
                    )
                )
                width += growth
            self.blocks.append(block)
        self.norm = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            features = [x]
            for layer in block:
                features.append(layer(torch.cat(features, 1)))
            x = nn.functional.avg_pool2d(torch.cat(features, 1), 2)
        return self.head(torch.relu(self.norm(x)).mean((2, 3)))


@seeded
def dense_net() -> Case:
    return Case(DenseNet(), nn.CrossEntropyLoss(), images(12), labels())


class ResidualBlock(nn.Module):
    """As torchvision writes it: the sum and both activations overwrite what batch norm returned."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module = nn.Identity()
        if stride > 1:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        identity = self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


class ResidualNet(nn.Sequential):
    # With fewer channels than a vector has elements, 16 with AVX-512, the backward pass of a strided
    # 1 x 1 convolution (float32, channels_last, CPU) writes beyond its memory
    # (github.com/uxlfoundation/oneDNN/issues/6035; torch 2.13 has it).
    def __init__(self, width: int = 16) -> None:
        super().__init__(
            nn.Conv2d(3, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            ResidualBlock(width, width, 1),
            ResidualBlock(width, 2 * width, 2),
            ResidualBlock(2 * width, 2 * width, 1),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(2 * width, CLASSES),
        )


@seeded
def residual() -> Case:
    return Case(ResidualNet(), nn.CrossEntropyLoss(label_smoothing=0.1), images(10), labels())


@seeded
def residual_channels_last() -> Case:
    return Case(
        ResidualNet().to(memory_format=torch.channels_last),
        nn.CrossEntropyLoss(),
        images(10).to(memory_format=torch.channels_last),
        labels(),
    )
