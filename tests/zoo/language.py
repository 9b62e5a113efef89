"""A small GPT on texts of different lengths."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from .case import SAMPLES, Case, seeded

VOCABULARY = 17
LENGTH = 9
IGNORED = -100


class Block(nn.Module):
    """Before each half a layer norm, after it dropout."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(self.norm1(x)).chunk(3, 2)
        )
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.dropout(self.projection(attended.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.mlp(self.norm2(x)))


class GPT(nn.Module):
    """Logits of the next token, ``(samples, length, vocabulary)``; embedding and head share a weight."""

    def __init__(self, dropout: float, recompute: bool = False, width: int = 16) -> None:
        super().__init__()
        self.recompute = recompute
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Parameter(torch.randn(LENGTH, width) * 0.1)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, 2, dropout) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.dropout(self.tokens(tokens) + self.positions)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)
        return self.head(self.norm(x))


def next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """A loss of one's own, which nothing can be read off: averages over targets that are not -100."""
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)


class ClassesFirst(nn.Module):
    """Logits as torch's own cross entropy wants them, ``(samples, vocabulary, length)``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens).transpose(1, 2)


def ragged_tokens() -> tuple[Tensor, Tensor]:
    """Texts of 1 to ``LENGTH`` tokens; the longer ones first, so that micro-batches weigh unequally."""
    tokens = torch.randint(VOCABULARY, (SAMPLES, LENGTH))
    lengths = torch.linspace(LENGTH, 1, SAMPLES).long()
    padding = torch.arange(LENGTH) >= lengths[:, None]
    return tokens, tokens.roll(-1, 1).masked_fill(padding, IGNORED)


def _gpt(dropout: float, recompute: bool = False) -> Case:
    tokens, targets = ragged_tokens()
    return Case(GPT(dropout, recompute), next_token_loss, tokens, targets, normalization="tokens")


@seeded
def gpt() -> Case:
    return _gpt(dropout=0.0)


@seeded
def gpt_dropout() -> Case:
    return _gpt(dropout=0.2)


@seeded
def gpt_dropout_checkpointed() -> Case:
    """Blocks are computed again in backward, and must drop the same."""
    return _gpt(dropout=0.2, recompute=True)


@seeded
def gpt_torch_loss() -> Case:
    tokens, targets = ragged_tokens()
    return Case(ClassesFirst(GPT(dropout=0.0)), nn.CrossEntropyLoss(), tokens, targets)
