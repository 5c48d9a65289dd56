"""GPT-2: a decoder with learned positions and pre-norm blocks.

Radford et al. 2019, "Language Models are Unsupervised Multitask Learners".
"""

import math
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmtrain.kernels.dropout import Dropout
from llmtrain.model import LanguageModel, ModelConfig, head_matrix, nearest_divisor
from llmtrain.model.layers.attention import AttentionMask, Kernel, attend, attention_mask, kernel_for
from llmtrain.model.layers.flex import HeadShape
from llmtrain.model.layers.kv_cache import KVCache, LayerCache
from llmtrain.model.layers.norms import LayerNorm
from llmtrain.model.layers.padded_vocabulary import hide_padding, logit_bias, padded_size


class Initialisation(Enum):
    """The distribution of the initial weights."""

    gpt2 = "gpt2"  # N(0, 0.02), residual projections scaled by 1/sqrt(2 layers), biases 0
    torch = "torch"  # torch's own: embeddings N(0, 1), linear layers U(-1, 1) / sqrt(inputs), their biases too


@dataclass(frozen=True)
class GPTConfig(ModelConfig):
    """Sizes of a GPT-2; the defaults of each size are in ``conf/model``."""

    num_layers: int
    hidden_size: int
    num_heads: int
    context_length: int
    vocab_size: int | None
    dropout: float
    qkv_bias: bool
    tie_embeddings: bool
    logit_softcap: float | None
    initialisation: Initialisation

    def __post_init__(self) -> None:
        self.check("num_layers", "hidden_size", "num_heads", "context_length")
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size}: must be divisible by num_heads={self.num_heads}; "
                f"model.num_heads={nearest_divisor(self.hidden_size, self.num_heads)} would do"
            )

    def build(self, vocab_size: int) -> "GPT":
        return GPT(self, vocab_size)


class Attention(nn.Module):
    """Causal multi-head self-attention, one matrix for queries, keys and values."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads  # here: fewer where ranks share them
        self.head_size = config.hidden_size // config.num_heads
        self.dropout = config.dropout
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.qkv_bias)
        self.projection = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, cache: LayerCache | None, mask: AttentionMask) -> Tensor:
        """``x`` and the result: ``(batch, sequence, hidden)``."""
        heads = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_size))
        # each (batch, heads, sequence, head_size); in this order one copy joins their gradients
        query, key, value = (each.transpose(1, 2) for each in heads.unbind(2))
        if cache is not None:
            key, value = cache.update(key, value)
        y = attend(query, key, value, mask, self.dropout if self.training else 0.0)
        return self.projection(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """The feed-forward network, with GELU in GPT-2's tanh form."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.hidden_size, 4 * config.hidden_size)
        self.down = nn.Linear(4 * config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class Block(nn.Module):
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))``, the residual stream in the dtype of ``x``."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm = LayerNorm(config.hidden_size)
        self.attention = Attention(config)
        self.mlp_norm = LayerNorm(config.hidden_size)
        self.mlp = MLP(config)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, cache: LayerCache | None = None, mask: AttentionMask = None) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), cache, mask))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class GPT(LanguageModel):
    """A GPT-2 of any size."""

    takes_part = True

    def __init__(self, config: GPTConfig, vocab_size: int) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = vocab_size
        self.padded_vocab_size = padded_size(vocab_size)
        self.context_length = config.context_length
        self.num_layers = config.num_layers
        self.logit_softcap = config.logit_softcap
        self.token_embedding = nn.Embedding(self.padded_vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.context_length, config.hidden_size)
        self.dropout = Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.final_norm = LayerNorm(config.hidden_size)
        if not config.tie_embeddings:
            self.head = nn.Linear(config.hidden_size, self.padded_vocab_size, bias=False)
        self.register_buffer("logit_bias", None, persistent=False)
        hide_padding(self, ("token_embedding.weight", "head.weight"), vocab_size)

    def hidden(self, ids: Tensor, cache: KVCache | None = None, segments: Tensor | None = None) -> Tensor:
        assert cache is None or segments is None
        length, past = ids.shape[1], 0 if cache is None else cache.length
        positions, starts = self.token_positions(ids, cache, segments)
        if starts is not None:
            positions = positions - starts
        dropout = self.config.dropout if self.training else 0.0
        heads = self._heads()
        kernel = kernel_for(ids, heads.size, dropout) if cache is None else Kernel.sdpa
        fixed = None if cache is None else cache.fixed
        part = self.part if cache is None else None
        mask = attention_mask(
            length, past, ids.device, starts=starts, kernel=kernel, heads=heads, fixed=fixed, part=part
        )
        x = self.embed(ids, positions)
        if cache is None:
            x = self.run_blocks(x, [(None, mask)] * self.num_layers)
        else:
            for layer, block in enumerate(self.blocks):
                x = block(x, cache.layer(layer), mask)
            cache.advance(length)
        return self.final_norm(x)

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        embedded = self.token_embedding(ids) + self.position_embedding(positions)
        return self.dropout(self.residual_stream(embedded))

    def _heads(self) -> HeadShape:
        """The heads of every layer in this process."""
        block: Any = next(block for block in self.blocks if isinstance(block, Block))  # not all may be here
        heads, dtype = block.attention.num_heads, block.attention_norm.weight.dtype
        return HeadShape(heads, heads, block.attention.head_size, dtype)

    @property
    def head_weight(self) -> Tensor:
        return self.token_embedding.weight if self.config.tie_embeddings else head_matrix(self.head)

    def fill(self, name: str, whole: Tensor, generator: torch.Generator) -> None:
        """Fill ``whole`` as ``initialisation`` names; norms become the identity."""
        if "norm" in name:
            whole.fill_(1.0 if name.endswith("weight") else 0.0)
        elif self.config.initialisation is Initialisation.gpt2:
            self._fill_as_gpt2(name, whole, generator)
        else:
            self._fill_as_torch(name, whole, generator)
        if name in self.padded_weights:
            whole[self.vocab_size :] = 0.0

    def _fill_as_gpt2(self, name: str, whole: Tensor, generator: torch.Generator) -> None:
        if name.endswith("bias"):
            whole.zero_()
            return
        residual = name.endswith(("attention.projection.weight", "mlp.down.weight"))
        whole.normal_(0.0, 0.02 / math.sqrt(2 * self.num_layers) if residual else 0.02, generator=generator)

    def _fill_as_torch(self, name: str, whole: Tensor, generator: torch.Generator) -> None:
        if "embedding" in name:
            whole.normal_(generator=generator)
        else:
            inputs = self.config.hidden_size * (4 if "mlp.down" in name else 1)
            whole.uniform_(-1 / math.sqrt(inputs), 1 / math.sqrt(inputs), generator=generator)

    def set_buffers(self, device: torch.device) -> None:
        self.logit_bias = logit_bias(self.vocab_size, device)

    def new_cache(self, batch_size: int, dtype: torch.dtype) -> KVCache:
        heads, device = self._heads(), self.token_embedding.weight.device
        return KVCache(
            self.num_layers, batch_size, heads.keys, self.context_length, heads.size, device=device, dtype=dtype
        )

    def can_fix_shapes(self, length: int) -> bool:
        return True

    def parameters_by_part(self) -> dict[str, int]:
        hidden = self.config.hidden_size
        parts = {
            "token embedding": self.vocab_size * hidden,
            "position embedding": self.position_embedding.weight.numel(),
            "attention": self._count(".attention."),
            "mlp": self._count(".mlp."),
            "norms": self._count("norm."),
        }
        if not self.config.tie_embeddings:
            parts = parts | {"head": self.vocab_size * hidden}
        return parts | self.outer_adapters()

    def _count(self, part: str) -> int:
        return sum(parameter.numel() for name, parameter in self.named_parameters() if part in name)

    def attention_flops(self, layer: int, sequence_length: int) -> int:
        return 4 * self.config.hidden_size * sequence_length
