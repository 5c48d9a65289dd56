"""Numbers in 8 bits: which values there are, how far off one comes back, and that nothing is lost in the mean."""

import pytest
import torch

from llmtrain.optimizer.blockwise_quantization import Codebook, dequantise, dynamic_values, quantise

CPU = torch.device("cpu")


@pytest.fixture(params=[True, False], ids=["signed", "unsigned"])
def book(request: pytest.FixtureRequest) -> Codebook:
    return Codebook.make(signed=request.param, device=CPU)


def numbers(book: Codebook, blocks: int = 64) -> torch.Tensor:
    """Of all magnitudes down to what is below the smallest value."""
    generator = torch.Generator().manual_seed(0)
    x = 10 ** (-15 * torch.rand(blocks, 256, generator=generator)) * torch.rand(blocks, 256, generator=generator)
    return torch.where(torch.rand(x.shape, generator=generator) < 0.5, -x, x) if book.is_signed else x


def test_the_values_are_those_of_the_paper_and_their_squares():
    unsigned, signed = dynamic_values(signed=False), dynamic_values(signed=True)
    for values in (unsigned, signed):
        assert len(values) == 256
        assert bool((values[1:] > values[:-1]).all())
    assert unsigned[:4].tolist() == pytest.approx([0.0, 3.25e-7, 7.75e-7, 2.125e-6])
    assert unsigned[-3:].tolist() == pytest.approx([0.989453125, 0.996484375, 1.0])
    counts = [int(((unsigned >= 10.0**-k) & (unsigned < 10.0 ** (1 - k))).sum()) for k in range(1, 8)]
    assert counts == [128, 64, 32, 16, 8, 4, 2]
    positive = signed[signed > 0]
    assert positive[:3].tolist() == pytest.approx([5.5e-7, 3.25e-6, 7.75e-6])
    assert positive[-2:].tolist() == pytest.approx([0.99296875, 1.0])
    assert (-signed[signed < 0].flip(0)).tolist() == positive[1:].tolist()  # all but the smallest, in favour of -1
    assert torch.equal(Codebook.make(signed=True, device=CPU).values, signed.float())
    assert torch.equal(Codebook.make(signed=False, device=CPU).values, unsigned.square().float())


def test_the_tables_give_the_codes_of_a_search(book):
    """At every value, right beside it, and in between, for each of the 16 first bits of an fp32."""
    beside = [torch.nextafter(book.values, torch.tensor(to)) for to in (-2.0, 2.0)]
    x = torch.cat([book.values, *beside, numbers(book).flatten(), (book.values[1:] + book.values[:-1]) / 2])
    x = x.clamp(-1.0 if book.is_signed else 0.0, 1.0)
    code = book.floor.index_select(0, (x.view(torch.int32) >> 16) & 0xFFFF)
    code = code + (x >= book.above.index_select(0, code))
    assert torch.equal(code.long(), torch.bucketize(x, book.values, right=True) - 1)


@pytest.mark.parametrize(("uniform", "steps"), [(0.5, 0.5), (1e-6, 1.0), (1 - 1e-6, 1.0)])
def test_rounding_is_off_by_one_step_of_the_codes_at_most(book, uniform, steps):
    x = 3.7 * numbers(book)
    codes, scales = quantise(x, book, torch.full_like(x, uniform))
    assert (codes.dtype, scales.dtype, codes.shape, scales.shape) == (torch.uint8, torch.float32, x.shape, (64,))
    back = dequantise(codes, scales, book)
    assert torch.equal(scales, x.abs().amax(1))
    scaled = x / scales[:, None]
    below = (torch.bucketize(scaled, book.values, right=True) - 1).clamp(max=254)
    step = (book.values[below + 1] - book.values[below]) * scales[:, None]
    allowed = steps * step
    if not book.is_signed:
        allowed = torch.where(scaled < book.values[1], step, allowed)  # never down to 0
    assert bool(((back - x).abs() <= allowed * 1.001).all())
    largest = x.abs().argmax(1, keepdim=True)
    assert torch.equal(back.gather(1, largest), x.gather(1, largest))  # of either sign, exactly


def test_values_of_the_codebook_are_kept_exactly(book):
    x = book.values.view(1, 256)
    for uniform in (1e-6, 0.5, 1 - 1e-6):
        codes, scales = quantise(x, book, torch.full_like(x, uniform))
        assert codes.flatten().tolist() == list(range(256))
        assert scales.tolist() == [1.0]


def test_stochastic_rounding_keeps_the_mean(book):
    x = numbers(book, blocks=1)
    x[0, 0] = 1.0
    draws = 4000
    uniform = torch.rand(draws, 256, generator=torch.Generator().manual_seed(1))
    back = dequantise(*quantise(x.repeat(draws, 1), book, uniform), book)
    held = x[0].abs() > 0 if book.is_signed else x[0] > book.values[1]  # without a sign the smallest go up, never to 0
    below = (torch.bucketize(x[0], book.values, right=True) - 1).clamp(max=254)
    gap = (book.values[below + 1] - book.values[below]).double()
    share = ((x[0] - book.values[below]) / gap).clamp(0, 1)
    spread = gap * ((share * (1 - share) / draws).sqrt() + 1 / draws)
    assert bool(((back.double().mean(0) - x[0]).abs() <= 5 * spread)[held].all())


def test_zeros_and_tiny_numbers_are_rounded_to_zero():
    signed, unsigned = (Codebook.make(signed=sign, device=CPU) for sign in (True, False))
    half = torch.full((1, 256), 0.5)
    for book in (signed, unsigned):
        assert not dequantise(*quantise(torch.zeros(1, 256), book, half), book).any()
        tiny = torch.full((1, 256), 1e-36)
        assert torch.equal(dequantise(*quantise(tiny, book, half), book), tiny)
    x = torch.zeros(1, 256)
    x[0, :3] = torch.tensor([1.0, 1e-15, 1e-30])
    smallest = 3.25e-7**2
    assert dequantise(*quantise(x, unsigned, half), unsigned)[0, :4].tolist() == pytest.approx(
        [1, smallest, smallest, 0]
    )
    assert dequantise(*quantise(x, signed, half), signed)[0, :4].tolist() == [1, 0, 0, 0]
