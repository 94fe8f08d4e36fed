"""A small GPT-style language model, in blocks that can be cut."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fl_lightning.models.model import Model


class TokenEmbedding(nn.Module):
    """Word and position embeddings of a sequence of tokens.

    Args:
        vocabulary: Number of tokens.
        length: Longest sequence.
        width: Width of an embedding.
        padding: The token with which sequences are filled up at the left; its embeddings there are zero. None: there is
            no such token.
    """

    def __init__(self, vocabulary: int, length: int, width: int, padding: int | None = None) -> None:
        super().__init__()
        self.padding = padding
        self.wte = nn.Embedding(vocabulary, width)
        self.wpe = nn.Embedding(length, width)
        nn.init.normal_(self.wte.weight, std=0.02)
        nn.init.normal_(self.wpe.weight, std=0.01)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return embeddings ``(N, T, D)`` of tokens ``(N, T)``."""
        if tokens.shape[1] > self.wpe.num_embeddings:
            raise ValueError(f"a sequence of {tokens.shape[1]} tokens is longer than {self.wpe.num_embeddings}.")
        x: Tensor = self.wte(tokens) + self.wpe.weight[: tokens.shape[1]]
        if self.padding is None:
            return x
        return x * (tokens != self.padding).cumsum(1).bool().unsqueeze(-1)


def attention_mask(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return which tokens are no padding, bool (N, T, 1), and which see which, bool (N, 1, T, T).

    Padding is a row of zeros and stays one through all blocks. So an activation carries its own mask wherever a model
    is cut, and none need be sent beside it. A token sees itself and those before it but padding.

    Args:
        x: Hidden states ``(N, T, D)``.
    """
    real = x.detach().ne(0).any(-1)
    causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
    seen = (causal & real.unsqueeze(1)) | torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
    return real.unsqueeze(-1), seen.unsqueeze(1)


class CausalBlock(nn.Module):
    """Causal self-attention and a feed-forward layer, each after a LayerNorm and beside a residual connection.

    Args:
        width: Width of a token, a multiple of ``num_heads``.
        num_heads: Attention heads.
        padded: Whether rows of zeros are padding, which nobody sees.
    """

    def __init__(self, width: int, num_heads: int, padded: bool = False) -> None:
        super().__init__()
        self.padded = padded
        self.num_heads = num_heads
        self.ln_1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(N, T, D)`` for ``(N, T, D)``; position t sees positions up to t."""
        batch, length, width = x.shape
        query, key, value = (
            part.view(batch, length, self.num_heads, -1).transpose(1, 2) for part in self.qkv(self.ln_1(x)).chunk(3, 2)
        )
        real, seen = attention_mask(x) if self.padded else (None, None)
        mixed = F.scaled_dot_product_attention(query, key, value, seen, is_causal=seen is None)
        x = x + self.proj(mixed.transpose(1, 2).reshape(batch, length, width))
        x = x + self.mlp(self.ln_2(x))
        return x if real is None else x * real


class LastToken(nn.Module):
    """The final LayerNorm at the last token: where the next one is predicted.

    Args:
        width: Width of a token.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln_f = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """Return features ``(N, D)`` of hidden states ``(N, T, D)``."""
        features: Tensor = self.ln_f(x[:, -1])
        return features


def gpt(
    num_classes: int,
    in_channels: int = 1,
    image_size: int = 64,
    width: int = 64,
    depth: int = 4,
    num_heads: int = 4,
    tie_weights: bool = False,
    padding: int | None = None,
) -> Model:
    """Build a small GPT that predicts the token after a sequence, such as the letter of an answer.

    Radford et al., Language Models are Unsupervised Multitask Learners, 2019. Sequences are padded at the left, so the
    last position is the one whose successor counts. With that, a language model is a classifier over its vocabulary,
    and is trained, evaluated and cut like any other model.

    Args:
        num_classes: Size of the vocabulary.
        in_channels: Channels of an example; a sequence has 1.
        image_size: Tokens of the longest sequence.
        width: Width of a token, a multiple of ``num_heads``.
        depth: Number of blocks.
        num_heads: Attention heads of a block.
        tie_weights: Whether the head is the word embedding, as in GPT-2. Both are then at the client, or nowhere.
        padding: The token with which shorter sequences are filled up at the left, and which no other then sees. None:
            all tokens are seen.
    """
    if in_channels != 1:
        raise ValueError(f"a language model reads sequences of tokens (1 channel), but the data has {in_channels}.")
    if width % num_heads:
        raise ValueError(f"`num_heads` must divide `width` {width}, got {num_heads}.")
    embedding = TokenEmbedding(num_classes, image_size, width, padding)
    blocks = OrderedDict[str, nn.Module](embed=embedding)
    blocks.update({f"h{index}": CausalBlock(width, num_heads, padding is not None) for index in range(depth)})
    head = nn.Linear(width, num_classes, bias=False)
    nn.init.normal_(head.weight, std=0.02)
    if tie_weights:
        head.weight = embedding.wte.weight
    return Model(nn.Sequential(OrderedDict(blocks, readout=LastToken(width))), head, "lm_head")
