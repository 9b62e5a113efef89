"""The evaluation's networks: as their papers define them, and reduced in width and resolution so that
they train on two cores.

From configurations through Transformers, with random weights; AmoebaNet-D and U-Net are this project's.
Dropout and stochastic depth are off: a plain step draws its masks for whatever it computes at once, so
that the whole large batch would be no truth for its parts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sbp_fast.bench.models import UNet

from . import transformers_models as transformers
from .amoebanet import AmoebaNetD

CLASSIFICATION, SEGMENTATION = "classification", "segmentation"

# Makes a network for images [N, 3, pixels, pixels], floating point, from (classes, pixels).
_Make = Callable[[int, int], nn.Module]


class FromBytes(nn.Module):
    """A network for images as they are stored: uint8 [N, 1 or 3, H, W], 0..255.

    Pixels are mapped to -2..2. Part of the model, so that a large batch waits on the host, and travels,
    as one byte per pixel.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        # A buffer, so that the images become what the parameters are: of that dtype.
        self.register_buffer("middle", torch.tensor(127.5), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        middle: Tensor = self.get_buffer("middle")
        pixels = (images.to(middle.dtype) - middle) / (middle / 2)
        logits: Tensor = self.network(pixels.expand(-1, 3, -1, -1))
        return logits


@dataclass(frozen=True)
class Model:
    """One network of the evaluation.

    Attributes:
        name: as the paper writes it.
        task: :data:`CLASSIFICATION` or :data:`SEGMENTATION`.
        full, reduced: make it.
        source: the paper that defines it.
        parameters: what is published, in millions, for ImageNet's 1000 classes (U-Net: for 2).
        decimals: of that figure.
    """

    name: str
    task: str
    full: _Make
    reduced: _Make
    source: str
    parameters: float
    decimals: int

    def make(self, classes: int, pixels: int, *, reduced: bool) -> nn.Module:
        """Images uint8 [N, 1 or 3, pixels, pixels] to logits [N, classes], for segmentation
        [N, classes, pixels, pixels]; in training mode, with new random weights."""
        make = self.reduced if reduced else self.full
        return FromBytes(make(classes, pixels)).train()


MODELS = {
    model.name: model
    for model in (
        Model(
            "ResNet-50",
            CLASSIFICATION,
            lambda classes, _: transformers.resnet((3, 4, 6, 3), 64, classes),
            lambda classes, _: transformers.resnet((3, 4, 6, 3), 8, classes),
            "He, Zhang, Ren, Sun, CVPR 2016, table 1; parameters as in torchvision's documentation",
            *(25.6, 1),
        ),
        Model(
            "ResNet-101",
            CLASSIFICATION,
            lambda classes, _: transformers.resnet((3, 4, 23, 3), 64, classes),
            lambda classes, _: transformers.resnet((3, 4, 23, 3), 8, classes),
            "He, Zhang, Ren, Sun, CVPR 2016, table 1; parameters as in torchvision's documentation",
            *(44.5, 1),
        ),
        Model(
            "AmoebaNet-D",
            CLASSIFICATION,
            lambda classes, _: AmoebaNetD(18, 208, classes),
            lambda classes, _: AmoebaNetD(3, 32, classes, stem=8),
            "Real, Aggarwal, Huang, Le, AAAI 2019; parameters of (18, 208) in Huang et al., GPipe, "
            "NeurIPS 2019, table 1, with an auxiliary head of 0.8 million",
            *(82, 0),
        ),
        Model(
            "U-Net",
            SEGMENTATION,
            lambda classes, _: UNet(64, classes),
            lambda classes, _: UNet(8, classes),
            "Ronneberger, Fischer, Brox, MICCAI 2015, figure 1, with padding and batch norm",
            *(31.0, 1),
        ),
        Model(
            "EfficientNet-B0",
            CLASSIFICATION,
            lambda classes, pixels: transformers.efficientnet(1.0, classes, pixels),
            lambda classes, pixels: transformers.efficientnet(0.25, classes, pixels),
            "Tan, Le, ICML 2019, table 2",
            *(5.3, 1),
        ),
        Model(
            "ViT-B/16",
            CLASSIFICATION,
            lambda classes, pixels: transformers.vit(768, 12, 12, 16, classes, pixels),
            lambda classes, pixels: transformers.vit(48, 4, 3, 4, classes, pixels),
            "Dosovitskiy et al., ICLR 2021, table 1: 86 million without the head of 0.8",
            *(86.6, 1),
        ),
        Model(
            "Swin-T",
            CLASSIFICATION,
            lambda classes, pixels: transformers.swin(96, (2, 2, 6, 2), 4, 7, classes, pixels),
            lambda classes, pixels: transformers.swin(24, (2, 2), 4, 4, classes, pixels),
            "Liu et al., ICCV 2021, table 1: 28.3 million in the authors' repository",
            *(28.3, 1),
        ),
    )
}
