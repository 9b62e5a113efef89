"""Networks as Transformers writes them, from configurations: random weights, nothing is downloaded."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers.models.efficientnet.configuration_efficientnet import EfficientNetConfig
from transformers.models.efficientnet.modeling_efficientnet import (
    EfficientNetFinalBlockLayer,
    EfficientNetForImageClassification,
)
from transformers.models.resnet.configuration_resnet import ResNetConfig
from transformers.models.resnet.modeling_resnet import (
    ResNetBottleNeckLayer,
    ResNetForImageClassification,
)
from transformers.models.swin.configuration_swin import SwinConfig
from transformers.models.swin.modeling_swin import SwinForImageClassification
from transformers.models.vit.configuration_vit import ViTConfig
from transformers.models.vit.modeling_vit import ViTForImageClassification

# The last batch norm of a residual block begins small: Goyal et al. 2017, section 5.1, have a zero, with
# which the first gradient would say nothing of the layers before it.
_LAST_NORM = 0.2


def _labels(classes: int) -> dict[str, Any]:
    """Transformers names its classes: so many of them."""
    return {"num_labels": classes}


def _deviation(width: int) -> float:
    """Of the first weights: the authors' 0.02, and in reduced forms as much more as layers are narrower
    than ViT-B's 768, so that a few steps are enough to learn something."""
    return 0.02 if width >= 96 else 0.02 * (768 / width) ** 0.5


class Logits(nn.Module):
    """Returns the logits alone, as a torch loss wants them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        logits: Tensor = self.model(pixel_values=pixels).logits
        return logits


def resnet(depths: Sequence[int], width: int, classes: int) -> nn.Module:
    """Bottleneck ResNet of ``2 + 3 * sum(depths)`` layers; ``width`` is that of the stem, 64 in the
    paper."""
    config = ResNetConfig(
        embedding_size=width,
        hidden_sizes=[4 * width << stage for stage in range(4)],
        depths=list(depths),
        **_labels(classes),
    )
    model = ResNetForImageClassification(config)
    for module in model.modules():
        if isinstance(module, ResNetBottleNeckLayer):
            norms = [part for part in module.modules() if isinstance(part, nn.BatchNorm2d)]
            # The shortcut comes first, and then the layers.
            nn.init.constant_(norms[-1].weight, _LAST_NORM)
    return Logits(model)


def efficientnet(width: float, classes: int, pixels: int) -> nn.Module:
    """EfficientNet-B0 at ``width`` times its width; ``pixels`` is 32 or more."""
    config = EfficientNetConfig(
        width_coefficient=width,
        depth_coefficient=1.0,
        hidden_dim=int(1280 * width),
        image_size=pixels,
        dropout_rate=0.0,
        drop_connect_rate=0.0,
        **_labels(classes),
    )
    model = EfficientNetForImageClassification(config)
    # As torch does it: weights of 0.02, in batch norms too, would leave the gradient to the head.
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.BatchNorm2d)):
            module.reset_parameters()
    for module in model.modules():
        if isinstance(module, EfficientNetFinalBlockLayer):
            nn.init.constant_(module.project_bn.weight, _LAST_NORM)
    return Logits(model)


def vit(hidden: int, depth: int, heads: int, patch: int, classes: int, pixels: int) -> nn.Module:
    config = ViTConfig(
        hidden_size=hidden,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
        image_size=pixels,
        patch_size=patch,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=_deviation(hidden),
        **_labels(classes),
    )
    return Logits(ViTForImageClassification(config))


def swin(
    width: int, depths: Sequence[int], patch: int, window: int, classes: int, pixels: int
) -> nn.Module:
    """``width`` of the first stage, with heads of 32 channels (of 12 where it is narrower)."""
    channels = 32 if width % 32 == 0 else 12
    heads = itertools.accumulate(depths[1:], lambda count, _: 2 * count, initial=width // channels)
    config = SwinConfig(
        image_size=pixels,
        patch_size=patch,
        embed_dim=width,
        depths=list(depths),
        num_heads=list(heads),
        window_size=window,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        drop_path_rate=0.0,
        initializer_range=_deviation(width),
        **_labels(classes),
    )
    return Logits(SwinForImageClassification(config))
