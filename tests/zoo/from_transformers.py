"""Architectures as Transformers writes them, built from configurations: no weights, no network.

Widths and resolutions are reduced, depths of the convolutional nets are not.
"""

from __future__ import annotations

from torch import Tensor, nn
from transformers import (
    EfficientNetConfig,
    EfficientNetForImageClassification,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.models.efficientnet.modeling_efficientnet import EfficientNetFinalBlockLayer
from transformers.models.resnet.modeling_resnet import ResNetBottleNeckLayer

from .case import CLASSES, Case, images, labels, seeded


class Logits(nn.Module):
    """Returns the logits alone, as a torch loss wants them."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model.train()

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model(pixel_values=pixels).logits


def _classifier(model: PreTrainedModel, size: int) -> Case:
    return Case(Logits(model), nn.CrossEntropyLoss(), images(size), labels())


def _initialise(model: PreTrainedModel) -> None:
    """As torch does: weights of 0.02, in batch norms too, would leave nearly all of the gradient to the
    head.

    The last batch norm of a residual block begins with a small weight (Goyal et al. 2017, section 5.1,
    have a zero). With ones, gradients of a new ResNet-50 grow so much with depth that float32 keeps
    two digits of them, on whole batches as well.
    """
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.BatchNorm2d)):
            module.reset_parameters()
    for module in model.modules():
        if isinstance(module, ResNetBottleNeckLayer):
            nn.init.constant_(module.layer[-1].normalization.weight, 0.2)
        elif isinstance(module, EfficientNetFinalBlockLayer):
            nn.init.constant_(module.project_bn.weight, 0.2)


def _resnet50(activation: str) -> Case:
    """ResNet-50 at an eighth of its width: 53 batch norms."""
    config = ResNetConfig(
        embedding_size=8,
        hidden_sizes=[32, 64, 128, 256],
        depths=[3, 4, 6, 3],
        layer_type="bottleneck",
        hidden_act=activation,
        num_labels=CLASSES,
    )
    model = ResNetForImageClassification(config)
    _initialise(model)
    return _classifier(model, size=64)


@seeded
def resnet50() -> Case:
    return _resnet50("relu")


@seeded
def resnet50_smooth() -> Case:
    """Without the kinks of ReLU: of half a million activations some lie within float32's rounding error
    of zero, and their gradient is all or nothing."""
    return _resnet50("silu")


def _efficientnet(dropout: float, drop_connect: float) -> Case:
    """EfficientNet-B0 at a quarter of its width: 49 batch norms with an eps and a momentum of their
    own, swish, squeeze and excitation, depthwise convolutions."""
    config = EfficientNetConfig(
        width_coefficient=0.25,
        depth_coefficient=1.0,
        hidden_dim=320,
        image_size=64,
        dropout_rate=dropout,
        drop_connect_rate=drop_connect,
        num_labels=CLASSES,
    )
    model = EfficientNetForImageClassification(config)
    _initialise(model)
    return _classifier(model, size=64)


@seeded
def efficientnet() -> Case:
    return _efficientnet(dropout=0.0, drop_connect=0.0)


@seeded
def efficientnet_dropout() -> Case:
    return _efficientnet(dropout=0.3, drop_connect=0.4)


def _vit(dropout: float) -> Case:
    config = ViTConfig(
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=48,
        image_size=16,
        patch_size=4,
        hidden_dropout_prob=dropout,
        # Dropout of attention probabilities is a function call, which nobody can replace.
        attention_probs_dropout_prob=0.0,
        num_labels=CLASSES,
    )
    model = ViTForImageClassification(config)
    _initialise(model)
    return _classifier(model, size=16)


@seeded
def vit() -> Case:
    return _vit(dropout=0.0)


@seeded
def vit_dropout() -> Case:
    return _vit(dropout=0.2)


def _swin(dropout: float, drop_path: float) -> Case:
    """Attention in windows that are folded into the first dimension, shifted in every other block."""
    config = SwinConfig(
        image_size=32,
        patch_size=2,
        embed_dim=12,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=4,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=0.0,
        drop_path_rate=drop_path,
        num_labels=CLASSES,
    )
    model = SwinForImageClassification(config)
    _initialise(model)
    return _classifier(model, size=32)


@seeded
def swin() -> Case:
    return _swin(dropout=0.0, drop_path=0.0)


@seeded
def swin_dropout() -> Case:
    """With stochastic depth, and dropout inside the windows."""
    return _swin(dropout=0.2, drop_path=0.4)
