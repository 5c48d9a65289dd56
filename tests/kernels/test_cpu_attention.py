"""Attention by our own kernel: against float64, with torch's, in compiled code, and where it is not available."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llmtrain.kernels import cpu_attention
from llmtrain.kernels.cpu_attention import attend, find_kernel, is_available, supports

pytestmark = pytest.mark.skipif(
    not torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported(),
    reason="needs a CPU with AVX512-BF16 and without AMX",
)
needs_kernel = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

# batch, heads, heads of keys, sequence, head size: around the sizes of blocks, tiles and registers
SHAPES = [
    (1, 1, 1, 1, 16), (1, 2, 2, 5, 32), (2, 3, 1, 16, 48), (1, 2, 1, 47, 64), (1, 2, 2, 49, 64), (1, 1, 1, 95, 80),
    (2, 4, 2, 97, 64), (1, 2, 2, 127, 128), (1, 2, 2, 129, 64), (1, 6, 2, 300, 64), (2, 2, 2, 385, 96),
    (1, 1, 1, 1030, 256),
]  # fmt: skip


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def tensors(shape: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    """Queries, keys, values and a gradient of the result, in bf16, laid out as a projection leaves them."""
    batch, heads, key_heads, length, size = shape
    draw = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, length, count, size, generator=draw).bfloat16().transpose(1, 2)
        for count in (heads, key_heads, key_heads, heads)
    ]


def starts(batch: int, length: int, examples: int) -> Tensor:
    """The first key that each query sees, with about so many examples in a row; each row is cut elsewhere."""
    draw = torch.Generator().manual_seed(examples)
    begins = torch.rand(batch, length, generator=draw) < examples / length
    return torch.where(begins, torch.arange(length), 0).cummax(1).values.to(torch.int32)


def reference(parts: list[Tensor], first: Tensor | None, dtype: torch.dtype) -> list[Tensor]:
    """Torch's result and gradients in ``dtype``."""
    query, key, value = (part.detach().to(dtype).requires_grad_() for part in parts[:3])
    index = torch.arange(query.shape[2])
    mask = None if first is None else ((index <= index[:, None]) & (index >= first[..., None])).unsqueeze(1)
    result = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=query.shape[1] != key.shape[1]
    )
    result.backward(parts[3].to(dtype))
    return [result.detach(), *(part.grad for part in (query, key, value) if part.grad is not None)]


def ours(parts: list[Tensor], first: Tensor | None = None) -> list[Tensor]:
    query, key, value = (
        part.detach().clone(memory_format=torch.preserve_format).requires_grad_() for part in parts[:3]
    )
    result = attend(query, key, value, first)
    result.backward(parts[3])
    return [result.detach(), *(part.grad for part in (query, key, value) if part.grad is not None)]


def error(found: Tensor, exact: Tensor) -> float:
    """Relative; against 1 where a gradient is nothing, as that of the scores of a single key."""
    return float((found.double() - exact).norm() / exact.norm().clamp(min=1e-6 * exact.numel()))


@needs_kernel
@pytest.mark.parametrize("shape", SHAPES)
def test_errors_are_of_rounding_and_not_above_torchs(shape: tuple[int, ...]) -> None:
    parts = tensors(shape)
    exact, torchs = reference(parts, None, torch.float64), reference(parts, None, torch.bfloat16)
    if shape[3] == 1:
        assert torch.equal(ours(parts)[0], torchs[0])
        return
    for found, other, truth in zip(ours(parts), torchs, exact, strict=True):
        assert error(found, truth) < max(4e-3, 1.1 * error(other, truth))


@needs_kernel
@pytest.mark.parametrize("examples", [1, 3, 20, 200])
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[3] > 40])
def test_a_query_sees_the_keys_of_its_own_example(shape: tuple[int, ...], examples: int) -> None:
    parts, first = tensors(shape), starts(shape[0], shape[3], examples)
    exact, torchs = (reference(parts, first, dtype) for dtype in (torch.float64, torch.bfloat16))
    for found, other, truth in zip(ours(parts, first), torchs, exact, strict=True):
        assert error(found, truth) < max(4e-3, 1.1 * error(other, truth))


@needs_kernel
@pytest.mark.usefixtures("threads")
def test_the_number_of_threads_changes_no_bit() -> None:
    parts, found = tensors((1, 2, 1, 700, 64)), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.append(ours(parts))
    for each in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], each, strict=True))


@needs_kernel
def test_nan_spreads_to_its_own_row_alone() -> None:
    query, key, value, _ = tensors((1, 1, 1, 200, 64))
    query[0, 0, 150, 3] = torch.nan
    result = attend(query, key, value)
    assert result[0, 0, 150].isnan().all()
    assert result[0, 0, 151:].isfinite().all()
    assert result[0, 0, :150].isfinite().all()


@needs_kernel
def test_large_scores_do_not_overflow() -> None:
    parts = tensors((1, 2, 2, 300, 64))
    parts[0] *= 200
    for found, truth in zip(ours(parts), reference(parts, None, torch.float64), strict=True):
        assert found.isfinite().all()
        assert error(found, truth) < 2e-2


@needs_kernel
def test_heads_in_any_memory_layout_give_the_same() -> None:
    parts = tensors((2, 3, 3, 70, 32))
    across = [part.transpose(2, 3).contiguous().transpose(2, 3) for part in parts]  # the last dimension is not dense
    assert all(torch.equal(a, b) for a, b in zip(ours(parts), ours(across), strict=True))


@needs_kernel
def test_the_operation_passes_torchs_opcheck() -> None:
    query, key, value, _ = tensors((1, 2, 1, 20, 16))
    inputs = tuple(part.requires_grad_() for part in (query, key, value))
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(torch.ops.llmtrain.causal_attention.default, (*inputs, None), test_utils=tests,
                          atol=1e-2, rtol=1e-2)  # fmt: skip


@needs_kernel
def test_the_kernel_is_taken_for_bf16_and_its_head_sizes_alone() -> None:
    query = torch.zeros(1, 2, 8, 64)
    assert not supports(query)
    assert supports(query.bfloat16())
    assert not supports(query.bfloat16()[..., :40])
    with torch.autocast("cpu", torch.bfloat16):
        assert supports(query)
        assert attend(query, query, query).dtype == torch.bfloat16


# --- where it cannot be had ------------------------------------------------------------------------------------------


@pytest.fixture
def afresh() -> Iterator[None]:
    find_kernel.cache_clear()
    yield
    find_kernel.cache_clear()


@pytest.mark.usefixtures("afresh")
def test_a_missing_compiler_is_logged_and_torch_is_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LLMTRAIN_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_kernel() == (None, "no C++ compiler (g++)")
    assert not is_available()
    assert not supports(torch.zeros(1, 2, 8, 64, dtype=torch.bfloat16))


@needs_kernel
@pytest.mark.usefixtures("afresh")
def test_a_kernel_that_computes_wrongly_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LLMTRAIN_CACHE", str(tmp_path))
    source = tmp_path / "cpu_attention.cpp"
    source.write_text(cpu_attention.SOURCE.read_text())
    products = cpu_attention.SOURCE.with_name("bf16_products.h").read_text()
    source.with_name("bf16_products.h").write_text(products.replace("6.93147182e-1f", "6e-1f"))
    monkeypatch.setattr(cpu_attention, "SOURCE", source)
    kernel, reason = find_kernel()
    assert kernel is None
    assert reason.startswith("the kernel's results are wrong on this CPU, by ")
