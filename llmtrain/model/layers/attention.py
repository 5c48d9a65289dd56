"""Causal attention of the decoders: masks and the product itself.

A query sees the keys up to its own: with packed examples those of its own example, with a sliding window the last few.
The keys that it sees are therefore neighbours, and the index of the first one defines them.  A mask, if one is needed,
is made once a forward pass (:func:`attention_mask`) and passed to every block.
"""

from enum import Enum
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from llmtrain.base.device import device_type
from llmtrain.kernels import cpu_attention
from llmtrain.kernels.dropout import attend_with_dropout, is_drawn_here
from llmtrain.model.layers.flex import (
    MIN_HEAD_SIZE,
    BlockwiseMask,
    HeadShape,
    attend_to_blocks,
    block_mask,
    flex_failure,
    flex_notice,
    missing_requirement,
)
from llmtrain.model.layers.kv_cache import FixedShape
from llmtrain.model.layers.sequence_part import SequencePart

ALIGNMENT = 16  # keys: the rows of a mask on a GPU begin at multiples


class Kernel(Enum):
    """The implementations of attention.  All but ``sdpa`` avoid the mask and the matrix of all scores."""

    sdpa = "sdpa"  # torch.nn.functional.scaled_dot_product_attention
    flex = "flex"  # FlexAttention
    own = "own"  # llmtrain.kernels.cpu_attention


class FirstKeys(NamedTuple):
    """The mask for our own kernel: the first key that each query sees, ``(batch or 1, sequence)``, int32."""

    numbers: Tensor


class PartMask(NamedTuple):
    """The mask for some positions of every sequence: a plain one for each stretch, with the keys up to its end."""

    part: SequencePart
    stretches: tuple[range, ...]
    masks: tuple[Tensor | None, ...]


# Tensor: boolean, or added to the scores; None: a query sees all keys up to its own
AttentionMask = Tensor | BlockwiseMask | FirstKeys | PartMask | None


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
    heads: HeadShape | None = None,
    fixed: FixedShape | None = None,
    part: SequencePart | None = None,
) -> AttentionMask:
    """Make the mask of ``new`` tokens behind ``past`` cached ones, for a layer of any number of heads.

    ``starts``: from :func:`segment_starts`.  ``window``: a query sees its own key and ``window - 1`` before it.
    ``slopes`` ``(heads,)``: ALiBi, ``slope * (key - query)`` is added to the scores (Press et al. 2021,
    https://arxiv.org/abs/2108.12409).  ``kernel``: the implementation, from :func:`kernel_for`; ``heads``: to
    try FlexAttention with, the first time.  ``fixed``: of a cache with shapes that do not change, in place of ``past``.
    ``part``: the positions of the tokens, ``starts`` are theirs; any ``kernel`` but torch's is then ignored.
    """
    if part is not None:
        return _part_mask(new, device, part, starts, window, slopes)
    seen = past + new if fixed is None else fixed.seen
    if window is not None and seen <= window:
        window = None
    if fixed is None and starts is None and window is None and slopes is None and (past == 0 or new == 1):
        return None
    queries = torch.arange(past, past + new, device=device) if fixed is None else fixed.position
    first = torch.zeros_like(queries)[None] if starts is None else starts  # key that each query sees
    if window is not None:
        first = torch.maximum(first, queries - (window - 1))
    if kernel is Kernel.own and slopes is None:
        return FirstKeys(first.to(torch.int32))
    if kernel is Kernel.flex:
        if is_fake(first) and not (torch.cuda.is_available() and missing_requirement()):
            return None  # a plan: attention without a mask takes the same memory
        if not is_fake(first) and (heads is None or not flex_failure(heads, device, is_biased=slopes is not None)):
            return BlockwiseMask(block_mask(first), slopes)
    return mask_of_pairs(queries, first, seen, slopes, for_gpu=device_type(first) == "cuda")


def _part_mask(
    new: int, device: torch.device, part: SequencePart, starts: Tensor | None, window: int | None, slopes: Tensor | None
) -> PartMask:
    masks: list[Tensor | None] = []
    stretches, done = tuple(part.stretches(new)), 0
    for stretch in stretches:
        narrow = window if window is not None and stretch.stop > window else None
        is_plain = starts is None and narrow is None and slopes is None
        if is_plain and (device.type == "cuda" or stretch.start == 0):
            masks.append(None)
        else:
            queries = torch.arange(stretch.start, stretch.stop, device=device)
            first = torch.zeros_like(queries)[None] if starts is None else starts[:, done : done + len(stretch)]
            if narrow is not None:
                first = torch.maximum(first, queries - (narrow - 1))
            # one to be added, as for a GPU: of a boolean one every layer would keep a copy
            masks.append(mask_of_pairs(queries, first, stretch.stop, slopes, for_gpu=True))
        done += len(stretch)
    return PartMask(part, stretches, tuple(masks))


def mask_of_pairs(queries: Tensor, first: Tensor, seen: int, slopes: Tensor | None, *, for_gpu: bool) -> Tensor:
    """The mask ``(batch or 1, heads or 1, queries, seen)``: boolean, or to be added to the scores.

    Of a boolean mask, or of one whose rows are not aligned, a GPU's kernels make another in every layer, and keep each
    for the backward pass.
    """
    device = queries.device
    keys = torch.arange(-(-seen // ALIGNMENT) * ALIGNMENT if for_gpu else seen, device=device)
    mask = ((keys <= queries[:, None]) & (keys >= first[..., None])).unsqueeze(1)
    if slopes is None and not for_gpu:
        return mask
    bias = torch.zeros((), device=device) if slopes is None else slopes[:, None, None] * (keys - queries[:, None])
    if torch.is_autocast_enabled(device.type):  # converted once, not in every layer
        bias = bias.to(torch.get_autocast_dtype(device.type))
    return torch.where(mask, bias, -torch.inf)[..., :seen]


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
    return Kernel.flex


def attend(query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask, dropout: float = 0.0) -> Tensor:
    """Compute attention of ``query`` ``(batch, heads, new, head_size)``; the result has its shape.

    ``key`` and ``value``: ``(batch, key_heads, seen, head_size)``, each head shared by ``heads / key_heads`` of the
    query's (Ainslie et al. 2023, https://arxiv.org/abs/2305.13245).
    """
    repeats = query.shape[1] // key.shape[1]
    if isinstance(mask, BlockwiseMask):
        return attend_to_blocks(query, key, value, mask)
    if isinstance(mask, FirstKeys):
        return cpu_attention.attend(query, key, value, mask.numbers)
    if isinstance(mask, PartMask):
        return _attend_in_part(query, key, value, mask, dropout)
    if mask is None and query.shape[2] == key.shape[2] and not dropout and cpu_attention.supports(query):
        return cpu_attention.attend(query, key, value)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(query.dtype)
    is_written_out = dropout > 0 and is_drawn_here(query)
    can_share = device_type(query) == "cpu" or (mask is None and has_flash(query, dropout))
    is_shared = repeats > 1 and can_share and not is_written_out
    if repeats > 1 and not can_share and query.shape[2] == 1:
        return attend_as_rows(query, key, value, mask)
    if repeats > 1 and not is_shared:
        key, value = (heads.repeat_interleave(repeats, dim=1) for heads in (key, value))
    if is_written_out:
        return attend_with_dropout(query, key, value, mask, dropout)
    is_square = query.shape[2] == key.shape[2]
    bias = mask
    if mask is None and not is_square and query.shape[2] > 1:
        from torch.nn.attention.bias import causal_lower_right  # imports torch._dynamo, which takes a second

        bias = causal_lower_right(query.shape[2], key.shape[2])
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=bias, dropout_p=dropout, is_causal=mask is None and is_square, enable_gqa=is_shared
    )


def _attend_in_part(query: Tensor, key: Tensor, value: Tensor, mask: PartMask, dropout: float) -> Tensor:
    """Compute attention of the queries of some positions, each stretch of them with the keys up to its end."""
    device = query.device.type
    if torch.is_autocast_enabled(device):  # before the exchange, which then moves less
        low = torch.get_autocast_dtype(device)
        query, key, value = query.to(low), key.to(low), value.to(low)
    key, value = mask.part.gather(key, value)
    # a copy: of queries that are a part of a joint result, backward would keep the keys and values in it as well
    parts = query.clone().split([len(stretch) for stretch in mask.stretches], dim=2)
    results = [
        attend(part, key[:, :, : stretch.stop], value[:, :, : stretch.stop], own, dropout)
        for part, stretch, own in zip(parts, mask.stretches, mask.masks, strict=True)
    ]
    return torch.cat(results, dim=2)


def attend_as_rows(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Compute attention of one query token, the query heads that share a key head as rows of one matrix.

    So every kernel shares key heads, and none is copied.
    """
    batch, heads, _, size = query.shape
    groups = key.shape[1]
    if mask is not None and mask.shape[1] > 1:
        mask = mask.view(mask.shape[0], groups, heads // groups, mask.shape[3])
    rows = query.reshape(batch, groups, heads // groups, size)
    return F.scaled_dot_product_attention(rows, key, value, attn_mask=mask).reshape(batch, heads, 1, size)


def has_flash(query: Tensor, dropout: float) -> bool:
    """Return whether flash attention computes ``query`` on this GPU; without a GPU at work: on one of today.

    It and cuDNN's are the only kernels of torch 2.11 whose key heads can serve several query heads.
    """
    return _has_flash(query.dtype, query.shape[-1], dropout > 0, query.requires_grad)


def _has_flash(dtype: torch.dtype, head_size: int, has_dropout: bool, has_gradient: bool) -> bool:
    capability = torch.cuda.get_device_capability() if torch.cuda.is_initialized() else (9, 0)
    return flash_supports(capability, dtype, head_size, has_dropout=has_dropout, has_gradient=has_gradient)


def flash_supports(
    capability: tuple[int, int], dtype: torch.dtype, head_size: int, *, has_dropout: bool, has_gradient: bool
) -> bool:
    """Return whether flash attention supports a card and a head size: ``can_use_flash_attention`` in torch's source."""
    if dtype not in (torch.float16, torch.bfloat16) or not (8, 0) <= capability <= (12, 1) or head_size > 256:
        return False
    has_little_shared_memory = (8, 6) <= capability <= (8, 9) or capability >= (12, 0)
    if has_gradient and has_little_shared_memory:
        return head_size <= 192 or (head_size > 224 and not has_dropout)
    return True


def slow_attention_reason(device: torch.device, dtype: torch.dtype) -> str:
    """The reason why a faster attention is not available, or an empty string; on a GPU of the passes so far."""
    if device.type == "cuda":
        return flex_notice()
    reason = cpu_attention.find_kernel()[1] if device.type == "cpu" and dtype == torch.bfloat16 else ""
    return f"torch's kernel: {reason}; training is slower with it on this CPU" if reason else ""


# As torch.compiler.assume_constant_result does, which would import the compiler; that takes a second.
_has_flash._dynamo_marked_constant = True  # type: ignore[attr-defined]
cpu_attention.is_available._dynamo_marked_constant = True  # type: ignore[attr-defined]
