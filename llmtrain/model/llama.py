"""The decoder of Llama and its relatives: Mistral, Qwen 2 to 3, SmolLM 2, Baichuan 2, by configuration.

Touvron et al. 2023, "Llama 2"; Grattafiori et al. 2024, "The Llama 3 Herd of Models"; Jiang et al. 2023, "Mistral 7B";
Yang et al. 2024 and 2025, "Qwen2.5" and "Qwen3"; Yang et al. 2023, "Baichuan 2".
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmtrain.kernels.dropout import Dropout
from llmtrain.model import LanguageModel, ModelConfig, head_matrix, nearest_divisor
from llmtrain.model.layers.attention import (
    AttentionMask,
    Kernel,
    alibi_slopes,
    attend,
    attention_mask,
    kernel_for,
)
from llmtrain.model.layers.flex import HeadShape
from llmtrain.model.layers.kv_cache import KVCache, LayerCache
from llmtrain.model.layers.norms import RMSNorm, share
from llmtrain.model.layers.padded_vocabulary import hide_padding, logit_bias, padded_size
from llmtrain.model.layers.rotary import Rotary, Rotation, Scaling, make_rotation, rotate


class Position(Enum):
    """The encoding of positions."""

    rope = "rope"  # queries and keys are rotated by their position
    alibi = "alibi"  # scores fall with the distance, by a different slope in each head: Baichuan 2 13B


@dataclass(frozen=True)
class LlamaConfig(ModelConfig):
    """Sizes and variants; the values of each model are in ``conf/model``."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int | None  # None: hidden_size / num_heads
    intermediate_size: int
    context_length: int
    vocab_size: int | None
    position: Position
    rope_theta: float | None
    rope_scaling: Scaling
    rope_factor: float | None
    rope_low_freq_factor: float | None
    rope_high_freq_factor: float | None
    rope_original_context_length: int | None
    norm_eps: float
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    fused_qkv: bool
    sliding_window: int | None
    sliding_window_from_layer: int
    tie_embeddings: bool
    normalised_head: bool
    dropout: float
    logit_softcap: float | None
    initial_std: float

    def __post_init__(self) -> None:
        self.check(
            "num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_size", "intermediate_size",
            "context_length", "sliding_window",
        )  # fmt: skip
        if self.head_size is None and self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size}: must be divisible by num_heads={self.num_heads}; "
                f"model.num_heads={nearest_divisor(self.hidden_size, self.num_heads)} would do, or a head_size"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads={self.num_kv_heads}: num_heads={self.num_heads} must be divisible by it; "
                f"{nearest_divisor(self.num_heads, self.num_kv_heads)} would do"
            )
        self._check_positions()
        if self.sliding_window is None and self.sliding_window_from_layer:
            raise ValueError(
                f"sliding_window_from_layer={self.sliding_window_from_layer}: there is no window; give a "
                "sliding_window, or sliding_window_from_layer=0"
            )
        if self.sliding_window_from_layer < 0:
            raise ValueError(
                f"sliding_window_from_layer={self.sliding_window_from_layer}: must be 0 (every layer) or more"
            )
        for key in ("norm_eps", "initial_std"):
            if not 0 < getattr(self, key) < math.inf:
                raise ValueError(f"{key}={getattr(self, key)}: must be above 0")

    def _check_positions(self) -> None:
        if self.position is Position.rope:
            if self.rope_theta is None:
                raise ValueError("rope_theta=null: position=rope needs it; 10000 is usual")
            assert self.rotary is not None  # its constructor checks the values
            return
        if self.rope_scaling is not Scaling.none:
            raise ValueError(f"rope_scaling={self.rope_scaling.name}: position=alibi has no rotations; take none")
        for key in ("theta", "factor", "low_freq_factor", "high_freq_factor", "original_context_length"):
            if getattr(self, f"rope_{key}") is not None:
                value = getattr(self, f"rope_{key}")
                raise ValueError(f"rope_{key}={value}: position=alibi has no rotary positions; take null")

    @property
    def size_of_head(self) -> int:
        return self.hidden_size // self.num_heads if self.head_size is None else self.head_size

    @property
    def rotary(self) -> Rotary | None:
        """Rotary positions; None with ALiBi."""
        if self.position is Position.alibi or self.rope_theta is None:
            return None
        return Rotary(
            self.size_of_head, self.rope_theta, self.rope_scaling, self.rope_factor, self.rope_low_freq_factor,
            self.rope_high_freq_factor, self.rope_original_context_length,
        )  # fmt: skip

    def window(self, layer: int) -> int | None:
        """The largest number of keys that a query of ``layer`` sees; None: all up to its own."""
        return self.sliding_window if layer >= self.sliding_window_from_layer else None

    def build(self, vocab_size: int) -> "Llama":
        return Llama(self, vocab_size)


class Attention(nn.Module):
    """Causal self-attention whose keys and values may have fewer heads than the queries."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads  # here: fewer where ranks share them
        self.head_size = config.size_of_head
        self.dropout = config.dropout
        queries, keys, _ = self.sizes
        self.is_fused = config.fused_qkv
        if self.is_fused:
            self.qkv = nn.Linear(config.hidden_size, sum(self.sizes), bias=config.qkv_bias)
        else:
            self.query = nn.Linear(config.hidden_size, queries, bias=config.qkv_bias)
            self.key = nn.Linear(config.hidden_size, keys, bias=config.qkv_bias)
            self.value = nn.Linear(config.hidden_size, keys, bias=config.qkv_bias)
        self.projection = nn.Linear(queries, config.hidden_size, bias=config.output_bias)
        self.has_norms = config.qk_norm
        if self.has_norms:
            self.query_norm = RMSNorm(self.head_size, config.norm_eps)
            self.key_norm = RMSNorm(self.head_size, config.norm_eps)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """The numbers of channels of queries, keys and values."""
        keys = self.num_kv_heads * self.head_size
        return self.num_heads * self.head_size, keys, keys

    def forward(self, x: Tensor, cache: LayerCache | None, mask: AttentionMask, rotation: Rotation | None) -> Tensor:
        """``x`` and the result: ``(batch, sequence, hidden)``."""
        if self.is_fused:
            parts = self.qkv(x).split(self.sizes, dim=-1)
        else:
            for_query, for_key, for_value = share(x, 3)
            parts = self.query(for_query), self.key(for_key), self.value(for_value)
        query, key, value = (part.unflatten(-1, (-1, self.head_size)) for part in parts)  # (batch, sequence, heads, …)
        if self.has_norms:
            query, key = self.query_norm(query), self.key_norm(key)
        if rotation is not None:
            query, key = rotate(query, rotation), rotate(key, rotation)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        if cache is not None:
            key, value = cache.update(key, value)
        y = attend(query, key, value, mask, self.dropout if self.training else 0.0)
        return self.projection(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """The gated feed-forward network: SwiGLU (Shazeer 2020, https://arxiv.org/abs/2002.05202)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        for_gate, for_up = share(x, 2)
        return self.down(F.silu(self.gate(for_gate)) * self.up(for_up))


class Block(nn.Module):
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))``, the residual stream in the dtype of ``x``."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config)
        self.dropout = Dropout(config.dropout)

    def forward(
        self, x: Tensor, cache: LayerCache | None = None, mask: AttentionMask = None, rotation: Rotation | None = None
    ) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), cache, mask, rotation))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class ConstantVector(nn.Module):
    """A vector computed from the configuration: on the model's device, always fp32, and in no state dict."""

    value: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("value", None, persistent=False)

    def _apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> "ConstantVector":
        before = self.value
        super()._apply(function, recurse)
        if before is not None and self.value.dtype != torch.float32:
            self.value = before.to(self.value.device)
        return self


class Llama(LanguageModel):
    """A Llama of any size, or a related model."""

    takes_part = True

    def __init__(self, config: LlamaConfig, vocab_size: int) -> None:
        super().__init__()
        self.config = config
        self.rotary = config.rotary
        self.vocab_size = vocab_size
        self.padded_vocab_size = padded_size(vocab_size)
        self.context_length = config.context_length
        self.num_layers = config.num_layers
        self.logit_softcap = config.logit_softcap
        self.token_embedding = nn.Embedding(self.padded_vocab_size, config.hidden_size)
        self.dropout = Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.final_norm = RMSNorm(config.hidden_size, config.norm_eps)
        if not config.tie_embeddings:
            self.head = nn.Linear(config.hidden_size, self.padded_vocab_size, bias=False)
        self.positions = ConstantVector()  # frequencies (head_size / 2,), or slopes (heads,)
        self.register_buffer("logit_bias", None, persistent=False)
        hide_padding(self, ("token_embedding.weight", "head.weight"), vocab_size)

    def hidden(self, ids: Tensor, cache: KVCache | None = None, segments: Tensor | None = None) -> Tensor:
        assert cache is None or segments is None
        length = ids.shape[1]
        positions, starts = self.token_positions(ids, cache, segments)
        end = length if self.part is None else self.part.whole_length
        rotation = self._rotation(positions, end if cache is None else cache.length + length, starts)
        masks = self._masks(ids, cache, starts)
        x = self.embed(ids, positions)
        if cache is None:
            windows = map(self.config.window, range(self.num_layers))
            x = self.run_blocks(x, [(None, masks[window], rotation) for window in windows])
        else:
            for layer, block in enumerate(self.blocks):
                x = block(x, cache.layer(layer), masks[self.config.window(layer)], rotation)
            cache.advance(length)
        return self.final_norm(x)

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        return self.dropout(self.residual_stream(self.token_embedding(ids)))

    def _rotation(self, positions: Tensor, end: int, starts: Tensor | None) -> Rotation | None:
        """The rotation of the tokens at ``positions`` of a sequence of ``end`` tokens; None with ALiBi."""
        if self.rotary is None:
            return None
        positions = positions[None] if starts is None else positions - starts
        frequencies = self.positions.value
        if self.rotary.changes_at(end):
            frequencies = self.rotary.frequencies(positions.device, end)
        return make_rotation(positions, frequencies, self.rotary.magnitude)

    def _masks(self, ids: Tensor, cache: KVCache | None, starts: Tensor | None) -> dict[int | None, AttentionMask]:
        """The attention mask for each sliding window among the layers."""
        length, past = ids.shape[1], 0 if cache is None else cache.length
        dropout = self.config.dropout if self.training else 0.0
        kernel = kernel_for(ids, self.config.size_of_head, dropout) if cache is None else Kernel.sdpa
        slopes = self.positions.value if self.rotary is None else None
        heads = self._heads()
        fixed = None if cache is None else cache.fixed
        return {
            window: attention_mask(
                length, past, ids.device, starts=starts, window=window, slopes=slopes, kernel=kernel, heads=heads,
                fixed=fixed, part=self.part if cache is None else None,
            )
            for window in {self.config.window(layer) for layer in range(self.num_layers)}
        }  # fmt: skip

    def _heads(self) -> HeadShape:
        """The heads of every layer in this process."""
        block: Any = next(block for block in self.blocks if isinstance(block, Block))  # not all may be here
        heads, keys, dtype = block.attention.num_heads, block.attention.num_kv_heads, block.attention_norm.weight.dtype
        return HeadShape(heads, keys, block.attention.head_size, dtype)

    @property
    def head_weight(self) -> Tensor:
        return F.normalize(self._matrix, dim=-1) if self.config.normalised_head else self._matrix

    @property
    def _matrix(self) -> Tensor:
        """The stored matrix of the output layer."""
        return self.token_embedding.weight if self.config.tie_embeddings else head_matrix(self.head)

    def logits(self, hidden: Tensor) -> Tensor:
        if not self.config.normalised_head:
            return super().logits(hidden)
        # divide the logits of a few tokens by the norms, rather than the whole matrix
        logits = F.linear(hidden, self._matrix) / self._matrix.norm(dim=-1).clamp_min(1e-12)
        if self.logit_softcap is not None:
            logits = self.logit_softcap * torch.tanh(logits / self.logit_softcap)
        return logits if self.head_bias is None else logits + self.head_bias

    def fill(self, name: str, whole: Tensor, generator: torch.Generator) -> None:
        """Fill matrices with N(0, ``initial_std``), biases with 0; norms become the identity."""
        if "norm" in name:
            whole.fill_(1.0)
        elif name.endswith("bias"):
            whole.zero_()
        else:
            whole.normal_(0.0, self.config.initial_std, generator=generator)
        if name in self.padded_weights:
            whole[self.vocab_size :] = 0.0

    def set_buffers(self, device: torch.device) -> None:
        cpu = torch.device("cpu")  # the same bits for every device
        values = alibi_slopes(self.config.num_heads) if self.rotary is None else self.rotary.frequencies(cpu)
        self.positions.value = values.to(device)
        self.logit_bias = logit_bias(self.vocab_size, device)

    def new_cache(self, batch_size: int, dtype: torch.dtype) -> KVCache:
        heads, device = self._heads(), self.token_embedding.weight.device
        return KVCache(
            self.num_layers, batch_size, heads.keys, self.context_length, heads.size, device=device, dtype=dtype
        )

    def can_fix_shapes(self, length: int) -> bool:
        return self.rotary is None or not self.rotary.changes_at(length)

    def parameters_by_part(self) -> dict[str, int]:
        parts = {
            "token embedding": self.vocab_size * self.config.hidden_size,
            "attention": self._count(".attention."),
            "mlp": self._count(".mlp."),
            "norms": self._count("norm."),
        }
        if not self.config.tie_embeddings:
            parts = parts | {"head": self.vocab_size * self.config.hidden_size}
        return parts | self.outer_adapters()

    def _count(self, part: str) -> int:
        named = [(name, p.numel()) for name, p in self.named_parameters() if part in name]
        return sum(count for name, count in named if part == "norm." or "norm." not in name)

    def attention_flops(self, layer: int, sequence_length: int) -> int:
        window = self.config.window(layer)
        keys = sequence_length if window is None else min(window, sequence_length)
        return 4 * self.config.num_heads * self.config.size_of_head * keys
