"""FlexAttention: attention on a GPU that skips blocks of keys, for packed examples, sliding windows and ALiBi.

Its kernels are compiled for each head size and dtype, by Triton, which needs a C compiler and Python's header files;
and their tiles have to fit into the card's shared memory.  So it is tried before it is relied on
(:func:`flex_failure`); where it does not run, a mask for torch's own kernels does the same.
"""

import importlib.util
import os
import shutil
import sysconfig
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from llmtrain.base.trusted_files import prepare_compiler_cache

BLOCK = 128  # queries, and keys, of a block that FlexAttention computes or skips
MIN_HEAD_SIZE = 16  # supported by FlexAttention's kernels
SHOWN_CHARACTERS = 160  # of a compiler's error

# of each trial so far: its error, or an empty string; kept for the process, so that every pass computes alike
_failures: dict[tuple[torch.device, "HeadShape", bool], str] = {}


class HeadShape(NamedTuple):
    """The heads of an attention layer, and the dtype that they have outside of autocast."""

    queries: int
    keys: int  # heads of keys and values
    size: int
    dtype: torch.dtype


class BlockwiseMask(NamedTuple):
    """The mask for FlexAttention, which lists the blocks with a visible pair, and ALiBi's slopes."""

    blocks: BlockMask
    slopes: Tensor | None  # (heads,)


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


def attend_to_blocks(query: Tensor, key: Tensor, value: Tensor, mask: BlockwiseMask) -> Tensor:
    """Compute attention of ``query`` ``(batch, heads, sequence, head_size)`` by FlexAttention."""
    flex = flex_attention if torch.compiler.is_compiling() else _compiled_flex()
    bias = None if mask.slopes is None else _distance_bias(mask.slopes)
    is_shared = query.shape[1] != key.shape[1]
    return flex(query, key, value, score_mod=bias, block_mask=mask.blocks, enable_gqa=is_shared)


@cache
def _compiled_flex() -> Any:
    prepare_compiler_cache()
    return torch.compile(flex_attention)  # uncompiled, it makes the matrix of all scores


def _distance_bias(slopes: Tensor) -> Callable[..., Tensor]:
    def bias(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score + slopes[head] * (key - query)

    return bias


# --- the trial ------------------------------------------------------------------------------------------------------


def missing_requirement() -> str:
    """Return what this machine lacks to compile FlexAttention's kernels, or an empty string."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton"
    if not os.environ.get("CC") and not any(shutil.which(compiler) for compiler in ("gcc", "clang")):
        return "a C compiler (gcc)"
    folders = {sysconfig.get_paths()["include"], sysconfig.get_paths("posix_prefix")["include"]}
    if not any(Path(folder, "Python.h").exists() for folder in folders):
        return "Python.h (Debian, Ubuntu: python3-dev)"
    return ""


def flex_failure(heads: HeadShape, device: torch.device, *, is_biased: bool) -> str:
    """Return why FlexAttention does not run for such heads, or an empty string: tried once in this process.

    ``is_biased``: with ALiBi.  Raises the errors that say nothing about FlexAttention: a device without free memory.
    """
    if torch.is_autocast_enabled(device.type):
        heads = heads._replace(dtype=torch.get_autocast_dtype(device.type))
    key = (device, heads, is_biased)
    if key not in _failures:
        try:
            try_flex(heads, device, is_biased=is_biased)
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except Exception as error:  # of Dynamo, Inductor, Triton, a C compiler: many classes with no common one
            _failures[key] = _describe(error)
        else:
            _failures[key] = ""
    return _failures[key]


def try_flex(heads: HeadShape, device: torch.device, *, is_biased: bool) -> None:
    """Run a forward and backward pass on a short sequence; raises what the compilers raise."""
    prepare_compiler_cache()
    # a function of its own: the compiler takes a second shape of flex_attention itself for a shape that varies
    compiled = torch.compile(_trial_loss, dynamic=False)
    with torch.enable_grad():
        query, key, value = (
            torch.zeros(1, count, 2 * BLOCK, heads.size, device=device, dtype=heads.dtype, requires_grad=True)
            for count in (heads.queries, heads.keys, heads.keys)
        )
        slopes = torch.ones(heads.queries, device=device) if is_biased else None
        first = torch.zeros(1, 2 * BLOCK, dtype=torch.int64, device=device)
        compiled(query, key, value, BlockwiseMask(block_mask(first), slopes)).backward()
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _trial_loss(query: Tensor, key: Tensor, value: Tensor, mask: BlockwiseMask) -> Tensor:
    return attend_to_blocks(query, key, value, mask).float().sum()


def flex_notice() -> str:
    """A message on the trials that failed in this process, and what would help; empty: none did."""
    failure = next(filter(None, _failures.values()), "")
    if not failure:
        return ""
    missing = missing_requirement()
    remedy = f"install {missing}" if missing else "a card with more shared memory, or a model of smaller heads, has it"
    if not missing and "out of resource" not in failure:
        remedy = "upgrade torch and triton together"
    return (
        f"FlexAttention does not run here ({failure}); {remedy}. Packed examples, sliding windows and ALiBi take a "
        "mask of all pairs of tokens, which takes more memory and time"
    )


def _describe(error: Exception) -> str:
    """The type and the first line of an error, shortened; of a compiler's, of the error that ended it."""
    while (inner := getattr(error, "inner_exception", None)) is not None:
        error = inner
    line = next(iter(str(error).strip().splitlines()), "")
    text = f"{type(error).__name__}: {line}" if line else type(error).__name__
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 1] + "…"
