"""The attention networks of the step benchmarks, made of torch's own layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_HEAD = 64


def _layers(hidden: int, depth: int) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(
        hidden,
        max(1, hidden // _HEAD),
        4 * hidden,
        dropout=0.0,
        activation="gelu",
        batch_first=True,
        norm_first=True,
    )
    return nn.TransformerEncoder(layer, depth, nn.LayerNorm(hidden), enable_nested_tensor=False)


class ViT(nn.Module):
    """Images [N, 3, pixels, pixels] to logits [N, classes], by the mean over patches.

    Source: Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021, section 3.1, with global
    average pooling (appendix D.3). Hidden 384 and depth 12: the small one of Touvron et al. 2021.
    """

    def __init__(
        self, hidden: int = 384, depth: int = 6, pixels: int = 64, patch: int = 8, classes: int = 10
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, hidden, patch, patch)
        self.positions = nn.Parameter(0.02 * torch.randn((pixels // patch) ** 2, hidden))
        self.layers = _layers(hidden, depth)
        self.head = nn.Linear(hidden, classes)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        logits: Tensor = self.head(self.layers(tokens).mean(1))
        return logits


class GPT(nn.Module):
    """Tokens [N, T] to logits [N, vocabulary, T]; the head's weight is the embedding's.

    Source: Radford et al., "Language Models are Unsupervised Multitask Learners", 2019, section 2.3.
    """

    def __init__(
        self, hidden: int = 256, depth: int = 4, length: int = 128, vocabulary: int = 1024
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, hidden)
        self.positions = nn.Parameter(0.02 * torch.randn(length, hidden))
        self.layers = _layers(hidden, depth)
        self.head = nn.Linear(hidden, vocabulary, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(length))

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens) + self.positions
        hidden = self.layers(hidden, mask=self.mask.to(hidden.dtype), is_causal=True)
        logits: Tensor = self.head(hidden).transpose(1, 2)
        return logits
