"""The demo's network: a small ResNet for 28 x 28 grey images.

Source: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2
(the CIFAR networks: a 3 x 3 stem, then three stages of equal depth, depth 6n + 2).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

# Mean and standard deviation of the pixels of Fashion-MNIST's training images, on the scale 0..1.
PIXEL_MEAN = 0.2860
PIXEL_STD = 0.3530


class Normalize(nn.Module):
    """Grey images [N, 28, 28], uint8 0..255 or floating point 0..1, to floating point [N, 1, 28, 28].

    Part of the model, so that a large batch waits on the host, and travels, as one byte per pixel.
    """

    def forward(self, images: Tensor) -> Tensor:
        if images.dtype == torch.uint8:
            images = images.to(torch.get_default_dtype()).div_(255)
        return ((images - PIXEL_MEAN) / PIXEL_STD).unsqueeze(1)


def convolution(inputs: int, outputs: int, stride: int) -> nn.Conv2d:
    """3 x 3, no bias: the norm that follows has one."""
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions around a shortcut, which is a 1 x 1 one where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            convolution(inputs, outputs, stride),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            convolution(outputs, outputs, 1),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.relu(self.residual(inputs) + self.shortcut(inputs))


class ResNet(nn.Module):
    """Images [N, 28, 28] (uint8 or floating point) to logits [N, classes].

    Depth 6 ``blocks`` + 2. The stages have ``width``, 2 ``width`` and 4 ``width`` channels at
    14 x 14, 7 x 7 and 4 x 4 pixels: for a run of a few dozen steps on a CPU, the stem has stride 2.
    """

    def __init__(self, width: int = 32, blocks: int = 1, classes: int = 10) -> None:
        super().__init__()
        stages: list[nn.Module] = []
        channels = width
        for stage in range(3):
            for block in range(blocks):
                outputs = width * 2**stage
                stride = 2 if stage > 0 and block == 0 else 1
                stages.append(ResidualBlock(channels, outputs, stride))
                channels = outputs
        self.layers = nn.Sequential(
            Normalize(),
            convolution(1, width, 2),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            *stages,
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(channels, classes),
        )

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.layers(images)
        return logits
