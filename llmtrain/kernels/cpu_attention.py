"""Causal attention in bf16 on CPUs with AVX512-BF16, by a kernel of our own (``cpu_attention.cpp``).

On these CPUs torch's attention does not use their bf16 instruction; it is fast only with AMX.  The kernel is compiled
at its first use, which takes a second, and kept.  Each process checks the kernel on a small problem before it uses it.
Without the kernel, attention is torch's.
"""

import ctypes
import math
import platform
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula, sdpa_backward_flop_count, sdpa_flop_count

from llmtrain.base.device import device_type
from llmtrain.kernels.build import load

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16")
HEAD_SIZE_MULTIPLE = 16
TOLERANCE = 0.02  # largest relative error of the kernel in its check: bf16 has 8 bits


class Operand(NamedTuple):
    """The address of a tensor, and its strides in elements."""

    address: int
    strides: Sequence[int]


def operand(tensor: Tensor) -> Operand:
    """The operand for ``tensor`` ``(batch, heads, sequence, head_size)``, whose last dimension is dense."""
    assert tensor.stride(-1) == 1 or tensor.shape[-1] == 1
    return Operand(tensor.data_ptr(), tensor.stride()[:3])


class Kernel:
    """The compiled functions.

    ``shape``: batch, heads, key heads, sequence, head size.  ``log_sums``: address of ``(batch, heads, sequence)``,
    fp32.  ``first``: address of ``(batch, sequence)``, int32, the first key that each query sees, which never falls
    along a row; None: 0.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        library.causal_attention_memory.restype = ctypes.c_int64

    def forward(self, operands: list[Operand], shape: Sequence[int], log_sums: int, first: int | None) -> None:
        """Compute the result; ``operands``: queries, keys, values, and the result to write."""
        self._call(self.library.causal_attention_forward, operands, shape, log_sums, first, False)

    def backward(self, operands: list[Operand], shape: Sequence[int], log_sums: int, first: int | None) -> None:
        """Compute the gradients; ``operands``: queries, keys, values, the result, its gradient, and three to write."""
        self._call(self.library.causal_attention_backward, operands, shape, log_sums, first, True)

    def _call(
        self, function: Any, operands: list[Operand], shape: Sequence[int], log_sums: int, first: int | None,
        is_backward: bool,
    ) -> None:  # fmt: skip
        threads = torch.get_num_threads()
        needed = self.library.causal_attention_memory(ctypes.c_int64(shape[3]), ctypes.c_int64(shape[4]), is_backward)
        memory = np.empty(threads * needed, dtype=np.uint8)
        strides = [stride for each in operands for stride in each.strides]
        function(
            (ctypes.c_void_p * len(operands))(*(each.address for each in operands)),
            (ctypes.c_int64 * len(strides))(*strides), (ctypes.c_int64 * len(shape))(*shape),
            ctypes.c_void_p(log_sums), ctypes.c_void_p(first), ctypes.c_float(1 / math.sqrt(shape[4])),
            ctypes.c_void_p(memory.ctypes.data), threads,
        )  # fmt: skip


@cache
def find_kernel() -> tuple[Kernel | None, str]:
    """Load the kernel; else None and the reason, which is empty where the kernel would be of no use."""
    is_suitable = platform.machine() in ("x86_64", "AMD64") and torch.cpu._is_avx512_bf16_supported()
    if not is_suitable or torch.cpu._is_amx_tile_supported():
        return None, ""
    try:
        kernel = Kernel(load(SOURCE, FLAGS))
    except OSError as failure:
        return None, str(failure)
    error = measure_error(kernel)
    return (kernel, "") if error < TOLERANCE else (None, f"the kernel's results are wrong on this CPU, by {error:.1%}")


def is_available() -> bool:
    return find_kernel()[0] is not None


def supports(tensor: Tensor) -> bool:
    """Return whether the kernel can compute attention of queries ``tensor`` ``(batch, heads, sequence, head_size)``."""
    return device_type(tensor) == "cpu" and _dtype(tensor) == torch.bfloat16 and supports_head_size(tensor.shape[-1])


def supports_head_size(head_size: int) -> bool:
    return head_size % HEAD_SIZE_MULTIPLE == 0 and is_available()


def attend(query: Tensor, key: Tensor, value: Tensor, first: Tensor | None = None) -> Tensor:
    """Causal attention of ``query`` ``(batch, heads, sequence, head_size)`` in bf16; the result has its shape.

    ``key`` and ``value`` may have fewer heads, each shared by several of the query's.  Query ``i`` sees the keys from
    ``first[:, i]`` to ``i``; ``first``: ``(batch or 1, sequence)``, int32, None for 0.  Not differentiable twice.
    """
    query, key, value = query.to(torch.bfloat16), key.to(torch.bfloat16), value.to(torch.bfloat16)
    if first is not None:
        first = first.expand(query.shape[0], -1).contiguous()
    return torch.ops.llmtrain.causal_attention(query, key, value, first)[0]


def _dtype(tensor: Tensor) -> torch.dtype:
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else tensor.dtype


def measure_error(kernel: Kernel) -> float:
    """Measure the largest relative error of result and gradients on a small problem, against float64."""
    heads, length, size = 2, 139, 32
    draw = np.random.default_rng(0)
    parts = [_as_bf16(draw.standard_normal((count, length, size))) for count in (heads, 1, 1, heads)]
    query, key, value, grad = (_as_float(part) for part in parts)
    scores = np.where(np.tri(length, dtype=bool), query @ key.mT / math.sqrt(size), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    result = weights @ value
    weight_grads = grad @ value.mT
    score_grads = weights * (weight_grads - (grad * result).sum(-1, keepdims=True)) / math.sqrt(size)
    expected = (result, score_grads @ key, (score_grads.mT @ query).sum(0, keepdims=True),
                (weights.mT @ grad).sum(0, keepdims=True))  # fmt: skip
    found = [np.empty(each.shape, dtype=np.uint16) for each in expected]
    log_sums = np.empty((heads, length), dtype=np.float32)
    inputs, outputs = (
        [Operand(each.ctypes.data, (0, length * size, size)) for each in group] for group in (parts, found)
    )
    shape = (1, heads, 1, length, size)
    kernel.forward([*inputs[:3], outputs[0]], shape, log_sums.ctypes.data, None)
    kernel.backward([*inputs[:3], outputs[0], inputs[3], *outputs[1:]], shape, log_sums.ctypes.data, None)
    errors = [
        np.linalg.norm(_as_float(ours) - exact) / np.linalg.norm(exact)
        for ours, exact in zip(found, expected, strict=True)
    ]
    return float(np.max(np.nan_to_num(errors, nan=np.inf)))


def _as_bf16(numbers: np.ndarray) -> np.ndarray:
    return (numbers.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def _as_float(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


# --- for torch ------------------------------------------------------------------------------------------------------
#
# Operations that torch's compiler, activation checkpointing and fake tensors treat like torch's own.
# (torch.library.custom_op would import the compiler at the first call, which takes a second.)

torch.library.define(
    "llmtrain::causal_attention", "(Tensor query, Tensor key, Tensor value, Tensor? first) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)  # fmt: skip
torch.library.define(
    "llmtrain::causal_attention_backward",
    "(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor? first, Tensor result, Tensor log_sums)"
    " -> (Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)


def _empty(like: Tensor) -> Tensor:
    """An empty tensor of the shape of ``like``; the heads of a token are contiguous, as the projections need them."""
    return torch.empty_like(like.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)


def _shape(query: Tensor, key: Tensor) -> tuple[int, ...]:
    return (query.shape[0], query.shape[1], key.shape[1], query.shape[2], query.shape[3])


def _kernel() -> Kernel:
    kernel, _ = find_kernel()
    assert kernel is not None
    return kernel


def _dense(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _address(first: Tensor | None) -> int | None:
    assert first is None or (first.is_contiguous() and first.dtype == torch.int32)
    return None if first is None else first.data_ptr()


@torch.library.register_fake("llmtrain::causal_attention")
def _results(query: Tensor, key: Tensor, value: Tensor, first: Tensor | None) -> tuple[Tensor, Tensor]:
    return _empty(query), query.new_empty(query.shape[:3], dtype=torch.float32)


@torch.library.impl("llmtrain::causal_attention", "cpu")
def _forward(query: Tensor, key: Tensor, value: Tensor, first: Tensor | None) -> tuple[Tensor, Tensor]:
    """Compute the result, and for each query the base-2 logarithm of its sum of weights."""
    inputs = [_dense(tensor) for tensor in (query, key, value)]
    result, log_sums = _results(query, key, value, first)
    operands = [operand(tensor) for tensor in (*inputs, result)]
    _kernel().forward(operands, _shape(query, key), log_sums.data_ptr(), _address(first))
    return result, log_sums


@torch.library.register_fake("llmtrain::causal_attention_backward")
def _gradients(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, first: Tensor | None, result: Tensor, log_sums: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(query), _empty(key), _empty(value)


@torch.library.impl("llmtrain::causal_attention_backward", "cpu")
def _backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, first: Tensor | None, result: Tensor, log_sums: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of queries, keys and values; ``grad`` is that of the result."""
    inputs = [_dense(tensor) for tensor in (query, key, value, result, grad)]
    grads = _gradients(grad, query, key, value, first, result, log_sums)
    operands = [operand(tensor) for tensor in (*inputs, *grads)]
    _kernel().backward(operands, _shape(query, key), log_sums.data_ptr(), _address(first))
    return grads


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor, Tensor, Tensor, None]:
    query, key, value, first, result, log_sums = ctx.saved_tensors
    backward = torch.ops.llmtrain.causal_attention_backward
    return (*backward(grad, query, key, value, first, result, log_sums), None)


torch.library.register_autograd("llmtrain::causal_attention", _differentiate, setup_context=_keep)


@register_flop_formula(torch.ops.llmtrain.causal_attention)
def _forward_flops(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(query, key, value)


@register_flop_formula(torch.ops.llmtrain.causal_attention_backward)
def _backward_flops(grad: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)
