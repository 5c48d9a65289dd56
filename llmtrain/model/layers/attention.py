"""Causal attention of the decoders: masks and the product itself.

A query sees the keys up to its own: with packed examples those of its own example, with a sliding window the last few.
The keys that it sees are therefore neighbours, and the index of the first one defines them.  A mask, if one is needed,
is made once a forward pass (:func:`attention_mask`) and passed to every block.
"""

import importlib.util
from collections.abc import Callable
from enum import Enum
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from llmtrain.base.device import device_type
from llmtrain.base.trusted_files import prepare_compiler_cache
from llmtrain.kernels import cpu_attention
from llmtrain.kernels.dropout import attend_with_dropout, is_drawn_here

BLOCK = 128  # queries, and keys, of a block that FlexAttention computes or skips
MIN_HEAD_SIZE = 16  # supported by FlexAttention's kernels


class Kernel(Enum):
    """The implementations of attention.  All but ``sdpa`` avoid the mask and the matrix of all scores."""

    sdpa = "sdpa"  # torch.nn.functional.scaled_dot_product_attention
    flex = "flex"  # FlexAttention
    own = "own"  # llmtrain.kernels.cpu_attention


class BlockwiseMask(NamedTuple):
    """The mask for FlexAttention, which lists the blocks with a visible pair, and ALiBi's slopes."""

    blocks: BlockMask
    slopes: Tensor | None  # (heads,)


class FirstKeys(NamedTuple):
    """The mask for our own kernel: the first key that each query sees, ``(batch or 1, sequence)``, int32."""

    numbers: Tensor


# Tensor: boolean, or added to the scores; None: a query sees all keys up to its own
AttentionMask = Tensor | BlockwiseMask | FirstKeys | None


def segment_starts(segments: Tensor) -> Tensor:
    """The index where each token's segment begins, ``(batch, sequence)``; a segment is a run of equal numbers."""
    index = torch.arange(segments.shape[1], device=segments.device)
    begins = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=True)
    return torch.where(begins, index, 0).cummax(dim=1).values


def alibi_slopes(heads: int) -> Tensor:
    """ALiBi's slopes ``(heads,)``, fp32: powers of ``2 ** (-8 / heads)``.

    If the number of heads is no power of 2: the slopes of the next smaller power, then every other one of twice that.
    """
    power = 1 << (heads.bit_length() - 1)
    ratios = [-8 * (i + 1) / power for i in range(power)]
    ratios += [-8 * (2 * i + 1) / (2 * power) for i in range(heads - power)]
    return torch.tensor([2.0**ratio for ratio in ratios], device="cpu")


def attention_mask(
    new: int,
    past: int,
    device: torch.device,
    *,
    starts: Tensor | None = None,
    window: int | None = None,
    slopes: Tensor | None = None,
    kernel: Kernel = Kernel.sdpa,
) -> AttentionMask:
    """Make the mask of ``new`` tokens behind ``past`` cached ones, for a layer of any number of heads.

    ``starts``: from :func:`segment_starts`.  ``window``: a query sees its own key and ``window - 1`` before it.
    ``slopes`` ``(heads,)``: ALiBi, ``slope * (key - query)`` is added to the scores (Press et al. 2021,
    https://arxiv.org/abs/2108.12409).  ``kernel``: the implementation, from :func:`kernel_for`.
    """
    if window is not None and past + new <= window:
        window = None
    if starts is None and window is None and slopes is None and (past == 0 or new == 1):
        return None
    queries = torch.arange(past, past + new, device=device)
    first = torch.zeros_like(queries)[None] if starts is None else starts  # key that each query sees
    if window is not None:
        first = torch.maximum(first, queries - (window - 1))
    if kernel is Kernel.own and slopes is None:
        return FirstKeys(first.to(torch.int32))
    if kernel is Kernel.flex:
        if is_fake(first):
            return None  # a plan: attention without a mask takes the same memory
        return BlockwiseMask(block_mask(first), slopes)
    keys = torch.arange(past + new, device=device)
    mask = ((keys <= queries[:, None]) & (keys >= first[..., None])).unsqueeze(1)  # (batch or 1, 1, new, past + new)
    if slopes is None:
        return mask
    bias = slopes[:, None, None] * (keys - queries[:, None])
    if torch.is_autocast_enabled(device.type):  # converted once, not in every layer
        bias = bias.to(torch.get_autocast_dtype(device.type))
    return bias.masked_fill(~mask, -torch.inf)


def kernel_for(ids: Tensor, head_size: int, dropout: float) -> Kernel:
    """Choose the implementation of attention without cached keys, backward included.

    FlexAttention's kernels are compiled with a block or alone.  A model compiled as a whole uses a plain mask: on a CPU
    torch 2.13 refuses block masks that are made in the same graph.
    """
    if dropout or torch.compiler.is_compiling():
        return Kernel.sdpa
    device = device_type(ids)
    if device == "cpu":
        has_own = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
        return Kernel.own if has_own and cpu_attention.supports_head_size(head_size) else Kernel.sdpa
    if device != "cuda" or head_size < MIN_HEAD_SIZE:
        return Kernel.sdpa
    return Kernel.flex if is_fake(ids) or importlib.util.find_spec("triton") is not None else Kernel.sdpa


def block_mask(first: Tensor) -> BlockMask:
    """Make FlexAttention's mask for queries that see the keys from ``first`` ``(batch, sequence)`` to their own.

    ``first`` never falls along a row, so the first query of a block sees furthest back and the last one least: the
    blocks follow without a mask of ``(sequence, sequence)``.
    """
    length = first.shape[1]
    index = torch.arange(-(-length // BLOCK), device=first.device)
    least = first[:, ::BLOCK, None]  # (batch, blocks, 1): of each block of queries
    most = first[:, ((index + 1) * BLOCK - 1).clamp(max=length - 1), None]
    past, seen = index < index[:, None], index <= index[:, None]
    whole = (index[:, None] + 1) * BLOCK <= length
    inner = past & whole & (index * BLOCK >= most)  # every query sees every key
    outer = seen & ((index + 1) * BLOCK > least) & ~inner

    def is_visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key >= first[batch, query])

    return BlockMask.from_kv_blocks(
        *_numbers(outer), *_numbers(inner), BLOCK_SIZE=BLOCK, mask_mod=is_visible, seq_lengths=(length, length)
    )


def _numbers(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """The number of key blocks of each query block, and their indices before the others; one head for all."""
    blocks = blocks.unsqueeze(1).to(torch.int32)
    return blocks.sum(-1, dtype=torch.int32), blocks.argsort(dim=-1, descending=True, stable=True).to(torch.int32)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask, dropout: float = 0.0) -> Tensor:
    """Compute attention of ``query`` ``(batch, heads, new, head_size)``; the result has its shape.

    ``key`` and ``value``: ``(batch, key_heads, seen, head_size)``, each head shared by ``heads / key_heads`` of the
    query's (Ainslie et al. 2023, https://arxiv.org/abs/2305.13245).
    """
    repeats = query.shape[1] // key.shape[1]
    if isinstance(mask, BlockwiseMask):
        flex = flex_attention if torch.compiler.is_compiling() else _compiled_flex()
        bias = None if mask.slopes is None else _distance_bias(mask.slopes)
        return flex(query, key, value, score_mod=bias, block_mask=mask.blocks, enable_gqa=repeats > 1)
    if isinstance(mask, FirstKeys):
        return cpu_attention.attend(query, key, value, mask.numbers)
    if mask is None and query.shape[2] == key.shape[2] and not dropout and cpu_attention.supports(query):
        return cpu_attention.attend(query, key, value)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(query.dtype)
    is_written_out = dropout > 0 and is_drawn_here(query)
    can_share = device_type(query) == "cpu" or (mask is None and _has_flash(query.dtype))
    is_shared = repeats > 1 and can_share and not is_written_out
    if repeats > 1 and not is_shared:
        key, value = (heads.repeat_interleave(repeats, dim=1) for heads in (key, value))
    if is_written_out:
        return attend_with_dropout(query, key, value, mask, dropout)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout,
        is_causal=mask is None and query.shape[2] == key.shape[2], enable_gqa=is_shared,
    )  # fmt: skip


def _has_flash(dtype: torch.dtype) -> bool:
    """Return whether a GPU has flash attention, the only kernel whose key heads can serve several query heads."""
    if dtype not in (torch.float16, torch.bfloat16):
        return False
    return not torch.cuda.is_initialized() or torch.cuda.get_device_capability() >= (8, 0)


def slow_attention_reason(device: torch.device, dtype: torch.dtype) -> str:
    """The reason why a faster attention is not available, or an empty string."""
    return cpu_attention.find_kernel()[1] if device.type == "cpu" and dtype == torch.bfloat16 else ""


# As torch.compiler.assume_constant_result does, which would import the compiler; that takes a second.
_has_flash._dynamo_marked_constant = True  # type: ignore[attr-defined]
cpu_attention.is_available._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _compiled_flex() -> Any:
    prepare_compiler_cache()
    return torch.compile(flex_attention)  # uncompiled, it makes the matrix of all scores


def _distance_bias(slopes: Tensor) -> Callable[..., Tensor]:
    def bias(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score + slopes[head] * (key - query)

    return bias
