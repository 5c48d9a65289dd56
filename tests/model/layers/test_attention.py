"""The keys that a query sees, in every implementation of attention."""

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from llmtrain.kernels import cpu_attention
from llmtrain.model.layers.attention import (
    FirstKeys,
    Kernel,
    alibi_slopes,
    attend,
    attend_as_rows,
    attention_mask,
    flash_supports,
    kernel_for,
    mask_of_pairs,
    segment_starts,
)
from llmtrain.model.layers.flex import BlockwiseMask, block_mask
from llmtrain.model.layers.sequence_part import SequencePart

CPU = torch.device("cpu")
SEGMENTS = torch.tensor([[1] * 5 + [2] * 3 + [3] + [0] * 3, [1] * 12, [4] * 4 + [9] * 8], dtype=torch.int32)


def expected(
    query: Tensor, key: Tensor, value: Tensor, segments: Tensor | None, window: int | None, slopes: Tensor | None
) -> Tensor:
    """Pair by pair and in float64, the queries last of all that was seen."""
    batch, heads, new, size = query.shape
    past = key.shape[2] - new
    result = torch.empty(query.shape, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            source = h // (heads // key.shape[1])
            for i in range(new):
                own = past + i
                keys = [j for j in range(own + 1) if window is None or own - j < window]
                keys = [j for j in keys if segments is None or segments[b, j] == segments[b, i]]
                scores = key[b, source, keys].double() @ query[b, h, i].double() / size**0.5
                if slopes is not None:
                    scores += slopes[h].double() * (torch.tensor(keys) - own)
                result[b, h, i] = scores.softmax(0) @ value[b, source, keys].double()
    return result


def heads(count: int, length: int, seed: int, size: int = 8) -> Tensor:
    return torch.randn(3, count, length, size, generator=torch.Generator().manual_seed(seed))


def test_segments_begin_where_the_number_changes() -> None:
    starts = segment_starts(SEGMENTS)
    assert starts.tolist() == [[0] * 5 + [5] * 3 + [8] + [9] * 3, [0] * 12, [0] * 4 + [4] * 8]


@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("window", [None, 4, 12])
@pytest.mark.parametrize("packed", [False, True])
def test_attention_is_that_of_each_pair(packed: bool, window: int | None, biased: bool, key_heads: int) -> None:
    query, key, value = heads(4, 12, 0), heads(key_heads, 12, 1), heads(key_heads, 12, 2)
    slopes = alibi_slopes(4) if biased else None
    starts = segment_starts(SEGMENTS) if packed else None
    seen = attention_mask(12, 0, CPU, starts=starts, window=window, slopes=slopes)
    assert (seen is None) == (not packed and not biased and window != 4)  # else the kernel's own causal mask does
    reference = expected(query, key, value, SEGMENTS if packed else None, window, slopes)
    torch.testing.assert_close(attend(query, key, value, seen).double(), reference, atol=1e-6, rtol=0)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("new", [1, 5])
def test_queries_behind_cached_keys_see_the_keys_before_them(new: int, window: int | None, biased: bool) -> None:
    query, key, value = heads(4, new, 0), heads(2, 12, 1), heads(2, 12, 2)
    slopes = alibi_slopes(4) if biased else None
    seen = attention_mask(new, 12 - new, CPU, window=window, slopes=slopes)
    reference = expected(query, key, value, None, window, slopes)
    torch.testing.assert_close(attend(query, key, value, seen).double(), reference, atol=1e-6, rtol=0)


def test_queries_behind_the_other_keys_see_those_up_to_their_own() -> None:
    query, key, value = heads(4, 5, 0), heads(2, 12, 1), heads(2, 12, 2)  # without a mask, as on a GPU
    reference = expected(query, key, value, None, None, None)
    torch.testing.assert_close(attend(query, key, value, None).double(), reference, atol=1e-6, rtol=0)


class TwoStretches(SequencePart):
    """Positions 3 to 5 and 8 to 11 of sequences whose keys and values are at hand."""

    whole_length = 12

    def __init__(self, key: Tensor, value: Tensor) -> None:
        self.whole = key, value

    def stretches(self, length: int) -> list[range]:
        assert length == 7
        return [range(3, 6), range(8, 12)]

    def gather(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return self.whole


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("packed", [False, True])
def test_some_positions_attend_to_the_keys_of_all(packed: bool, window: int | None, biased: bool) -> None:
    query, key, value = heads(4, 12, 0), heads(2, 12, 1), heads(2, 12, 2)
    part, slopes = TwoStretches(key, value), alibi_slopes(4) if biased else None
    positions = part.positions(7, CPU)
    assert positions.tolist() == [3, 4, 5, 8, 9, 10, 11]
    starts = segment_starts(SEGMENTS)[:, positions] if packed else None
    mask = attention_mask(7, 0, CPU, starts=starts, window=window, slopes=slopes, part=part)
    reference = expected(query, key, value, SEGMENTS if packed else None, window, slopes)[:, :, positions]
    own = (each[:, :, positions] for each in (query, key, value))
    torch.testing.assert_close(attend(*own, mask).double(), reference, atol=1e-6, rtol=0)


@pytest.mark.parametrize("biased", [False, True])
def test_a_gpus_mask_hides_the_same_keys_and_is_aligned(biased: bool) -> None:
    query, key, value = heads(4, 12, 0), heads(4, 12, 1), heads(4, 12, 2)
    queries, starts, slopes = torch.arange(12), segment_starts(SEGMENTS), alibi_slopes(4) if biased else None
    mask = mask_of_pairs(queries, starts, 12, slopes, for_gpu=True)
    assert mask.dtype == torch.float32
    assert mask.shape == (3, 4 if biased else 1, 12, 12)
    assert all(stride % 16 == 0 for stride in mask.stride()[:-1])
    reference = expected(query, key, value, SEGMENTS, None, slopes)
    torch.testing.assert_close(attend(query, key, value, mask).double(), reference, atol=1e-6, rtol=0)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("window", [None, 4])
def test_heads_that_share_a_key_are_rows_of_one_matrix(window: int | None, biased: bool) -> None:
    query, key, value = heads(4, 1, 0), heads(2, 12, 1), heads(2, 12, 2)
    slopes = alibi_slopes(4) if biased else None
    mask = attention_mask(1, 11, CPU, window=window, slopes=slopes)
    assert mask is None or isinstance(mask, Tensor)
    reference = expected(query, key, value, None, window, slopes)
    torch.testing.assert_close(attend_as_rows(query, key, value, mask).double(), reference, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("capability", "dtype", "head_size", "dropout", "gradient", "supported"),
    [
        ((8, 0), torch.bfloat16, 256, True, True, True),  # A100
        ((9, 0), torch.float16, 128, False, True, True),
        ((9, 0), torch.float32, 64, False, True, False),
        ((9, 0), torch.bfloat16, 264, False, False, False),
        ((7, 5), torch.float16, 64, False, True, False),  # T4
        ((8, 9), torch.bfloat16, 192, True, True, True),  # L4, RTX 4090
        ((8, 9), torch.bfloat16, 224, False, True, False),
        ((8, 9), torch.bfloat16, 224, False, False, True),
        ((8, 6), torch.bfloat16, 256, False, True, True),
        ((12, 0), torch.bfloat16, 256, True, True, False),  # RTX 5090
    ],
)
def test_flash_attention_is_for_half_precision_and_cards_that_have_it(
    capability: tuple[int, int], dtype: torch.dtype, head_size: int, dropout: bool, gradient: bool, supported: bool
) -> None:
    assert flash_supports(capability, dtype, head_size, has_dropout=dropout, has_gradient=gradient) is supported


def test_slopes_of_a_power_of_two_and_of_baichuan() -> None:
    assert alibi_slopes(8).tolist() == [2.0**-k for k in range(1, 9)]
    slopes = alibi_slopes(40)  # 32, then 8 of those for 64
    assert slopes[:32].tolist() == pytest.approx([2 ** (-k / 4) for k in range(1, 33)], rel=1e-6)
    assert slopes[32:].tolist() == pytest.approx([2 ** (-k / 8) for k in range(1, 17, 2)], rel=1e-6)


# --- FlexAttention -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "window"), [(128, None), (200, 5), (640, 128), (640, 300), (1000, 150)])
def test_blocks_are_those_that_torch_finds_pair_by_pair(length: int, window: int | None) -> None:
    draw = torch.Generator().manual_seed(length)
    cuts = [torch.randint(0, length, (4,), generator=draw).tolist() for _ in range(2)]
    segments = torch.tensor([[sum(cut <= i for cut in row) for i in range(length)] for row in cuts])
    seen = attention_mask(length, 0, CPU, starts=segment_starts(segments), window=window, kernel=Kernel.flex)
    assert isinstance(seen, BlockwiseMask)
    ours, theirs = seen.blocks, create_block_mask(seen.blocks.mask_mod, 2, None, length, length, device="cpu")
    assert torch.equal(ours.to_dense(), theirs.to_dense())
    for name in ("kv", "full_kv", "q", "full_q"):
        counts, expected_counts = getattr(ours, f"{name}_num_blocks"), getattr(theirs, f"{name}_num_blocks")
        assert torch.equal(counts, expected_counts)
        numbers, expected_numbers = getattr(ours, f"{name}_indices"), getattr(theirs, f"{name}_indices")
        used = torch.arange(numbers.shape[-1]) < counts[..., None]  # what is behind is not read
        assert torch.equal(numbers[used], expected_numbers[used])


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("biased", [False, True])
def test_flex_attention_is_told_the_same_as_a_mask_tells(biased: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmtrain.model.layers.flex._compiled_flex", lambda: flex_attention)  # compiling takes long
    query, key, value = heads(4, 200, 0, 16), heads(2, 200, 1, 16), heads(2, 200, 2, 16)
    segments = torch.arange(200).div(70, rounding_mode="floor").expand(3, -1)
    starts, slopes = segment_starts(segments), alibi_slopes(4) if biased else None
    by_blocks, by_mask = (
        attend(query, key, value, attention_mask(200, 0, CPU, starts=starts, window=40, slopes=slopes, kernel=kernel))
        for kernel in (Kernel.flex, Kernel.sdpa)
    )
    torch.testing.assert_close(by_blocks, by_mask, atol=1e-6, rtol=0)


def test_flex_attention_is_for_gpus() -> None:
    assert kernel_for(torch.zeros(1, 8, dtype=torch.long), 64, 0.0) is Kernel.sdpa


@pytest.mark.gpu
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_on_a_gpu_give_what_a_mask_gives(dtype: torch.dtype, biased: bool) -> None:
    cuda = torch.device("cuda")
    draw = torch.Generator(cuda).manual_seed(0)
    segments = torch.arange(320, device=cuda).div(90, rounding_mode="floor").expand(2, -1)
    slopes = alibi_slopes(4).to(cuda) if biased else None
    assert kernel_for(segments, 64, 0.0) is Kernel.flex
    found = []
    tensors = [torch.randn(2, n, 320, 64, device=cuda, generator=draw) for n in (4, 2, 2, 4)]
    for kernel, to in ((Kernel.flex, dtype), (Kernel.sdpa, torch.float32)):
        query, key, value = (tensor.to(to).requires_grad_() for tensor in tensors[:3])
        seen = attention_mask(320, 0, cuda, starts=segment_starts(segments), window=200, slopes=slopes, kernel=kernel)
        y = attend(query, key, value, seen)
        y.backward(tensors[3].to(to))
        found.append([tensor.float() for tensor in (y, query.grad, key.grad, value.grad) if tensor is not None])
    tolerance = 1e-4 if dtype == torch.float32 else 4e-2
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


# --- our own kernel ----------------------------------------------------------------------------------------------


@pytest.mark.skipif(not cpu_attention.is_available(), reason="needs a CPU with AVX512-BF16 and without AMX, and g++")
def test_our_own_kernel_is_for_bf16_on_a_cpu() -> None:
    ids = torch.zeros(1, 8, dtype=torch.long)
    with torch.autocast("cpu", torch.bfloat16):
        assert kernel_for(ids, 64, 0.0) is Kernel.own
        assert kernel_for(ids, 24, 0.0) is Kernel.sdpa
        assert kernel_for(ids, 64, 0.1) is Kernel.sdpa
        slopes = alibi_slopes(4)
        assert isinstance(attention_mask(8, 0, CPU, window=4, kernel=Kernel.own), FirstKeys)
        assert isinstance(attention_mask(8, 0, CPU, window=4, slopes=slopes, kernel=Kernel.own), Tensor)


@pytest.mark.skipif(not cpu_attention.is_available(), reason="needs a CPU with AVX512-BF16 and without AMX, and g++")
@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("window", [None, 4, 12])
@pytest.mark.parametrize("packed", [False, True])
def test_our_own_kernel_sees_the_keys_that_a_mask_shows(packed: bool, window: int | None, key_heads: int) -> None:
    query, key, value = (heads(count, 12, seed, 16).bfloat16() for seed, count in enumerate((4, key_heads, key_heads)))
    starts = segment_starts(SEGMENTS) if packed else None
    seen = attention_mask(12, 0, CPU, starts=starts, window=window, kernel=Kernel.own)
    assert seen is None or isinstance(seen, FirstKeys)
    reference = expected(query, key, value, SEGMENTS if packed else None, window, None)
    torch.testing.assert_close(attend(query, key, value, seen).double(), reference, atol=2e-2, rtol=2e-2)


def test_the_first_block_of_a_row_sees_itself() -> None:
    mask = block_mask(torch.zeros(1, 64, dtype=torch.long))
    assert mask.to_dense().tolist() == [[[[1]]]]
