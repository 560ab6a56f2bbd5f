"""ViT-tiny/16 (Touvron et al. 2021, DeiT-tiny) and a two-layer text classifier (BERT-tiny)."""

# mypy: allow-subclassing-any
from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional


class Attention(nn.Module):
    """Multi-head self-attention over [n,tokens,width]; ``mask`` is added to the scores."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.out(mixed.transpose(1, 2).reshape(batch, tokens, width))


class Mlp(nn.Sequential):
    """Two dense layers with GELU between."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


class VitBlock(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, 1e-6), nn.LayerNorm(width, 1e-6)
        self.attention, self.mlp = Attention(width, heads), Mlp(width, 4 * width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Vit(nn.Module):
    """Input [n,3,224,224] float32, output logits [n,classes]."""

    def __init__(self, width: int, heads: int, layers: int, classes: int = 1000) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 16, 16)
        self.class_token = nn.Parameter(torch.empty(1, 1, width))
        self.position = nn.Parameter(torch.empty(1, 14 * 14 + 1, width))
        self.blocks = nn.Sequential(*(VitBlock(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width, 1e-6)
        self.classifier = nn.Linear(width, classes)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        x = self.patches(input).flatten(2).transpose(1, 2)
        token = self.class_token.expand(x.shape[0], -1, -1)
        x = self.blocks(torch.cat([token, x], 1) + self.position)
        return self.classifier(self.norm(x)[:, 0])


class TextBlock(nn.Module):
    """Post-norm transformer block, as BERT."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention, self.mlp = Attention(width, heads), Mlp(width, 4 * width)
        self.norm1, self.norm2 = nn.LayerNorm(width, 1e-12), nn.LayerNorm(width, 1e-12)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = self.norm1(x + self.attention(x, mask))
        return self.norm2(x + self.mlp(x))


class TextTransformer(nn.Module):
    """Token ids and attention mask, both [n,tokens] int64; output logits [n,classes] float32.

    The mask is 1 for a token and 0 for padding.
    """

    def __init__(
        self,
        vocabulary: int = 8192,
        width: int = 128,
        heads: int = 2,
        layers: int = 2,
        tokens: int = 128,
        classes: int = 2,
    ) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(torch.empty(1, tokens, width))
        self.norm = nn.LayerNorm(width, 1e-12)
        self.blocks = nn.ModuleList(TextBlock(width, heads) for _ in range(layers))
        self.classifier = nn.Linear(width, classes)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        present = (attention_mask != 0).to(self.position.dtype)
        mask = ((1 - present) * -1e4)[:, None, None, :]
        x = self.norm(self.words(input_ids) + self.position[:, : input_ids.shape[1]])
        for block in self.blocks:
            x = block(x, mask)
        # Mean over the tokens that are there; an all-padding row gives 0, not a division by 0.
        total = (x * present[:, :, None]).sum(1)
        return self.classifier(total / present.sum(1, keepdim=True).clamp(min=1))


def vit_tiny() -> nn.Module:
    """ViT-tiny: width 192, 3 heads, 12 layers, patches of 16, 1000 classes."""
    return Vit(192, 3, 12)


def text_transformer() -> nn.Module:
    """Two layers of width 128, 2 heads, vocabulary 8192, up to 128 tokens, 2 classes."""
    return TextTransformer()
