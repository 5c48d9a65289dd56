"""Sampling: the distribution is the one asked for, and the cache changes nothing."""

import pytest
import torch

from llmtrain.base.named_generators import NamedGenerators
from llmtrain.inference.generate import Sampling, SamplingFailed, generate, stream_text
from llmtrain.model.gpt import GPT, GPTConfig, Initialisation

END = 50


def model() -> GPT:
    config = GPTConfig(2, 32, 4, 16, None, 0.1, True, True, None, Initialisation.torch)
    made = config.create(51, torch.device("cpu"), NamedGenerators(3))
    assert isinstance(made, GPT)
    return made


def sample(made: GPT, prompt: list[int], tokens: int, sampling: Sampling, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    ids = generate(
        made, prompt, max_tokens=tokens, sampling=sampling, generator=generator, dtype=torch.float32, end_of_text=END
    )
    return list(ids)


GREEDY = Sampling(0.0, 0, 1.0)


def test_greedy_generation_with_the_cache_is_the_argmax_without_it() -> None:
    made, ids = model().eval(), [1, 2, 3]
    with torch.no_grad():
        while len(ids) < 16:
            token = int(made(torch.tensor([ids]))[0, -1].argmax())
            if token == END:
                break
            ids.append(token)
    assert sample(made, [1, 2, 3], 13, GREEDY) == ids[3:]


def test_generation_continues_past_the_context_window() -> None:
    made = model()
    ids = sample(made, [1, 2, 3], 60, Sampling(1.0, 0, 1.0), seed=1)
    assert len(ids) > 20 or END in ids
    assert all(0 <= token < 51 for token in ids)


def test_generation_leaves_the_models_mode_and_torchs_generator_unchanged() -> None:
    made = model().train()
    before = torch.get_rng_state()
    sample(made, [1], 5, Sampling(1.0, 10, 0.9))
    assert made.training
    assert torch.equal(torch.get_rng_state(), before)


def test_the_same_seed_gives_the_same_text() -> None:
    made, hot = model(), Sampling(5.0, 0, 1.0)
    assert sample(made, [1], 12, hot, seed=5) == sample(made, [1], 12, hot, seed=5)
    assert sample(made, [1], 12, hot, seed=5) != sample(made, [1], 12, hot, seed=6)


def test_generation_ends_at_the_end_of_text() -> None:
    made = model()
    with torch.no_grad():
        made.final_norm.weight.zero_()
        made.final_norm.bias.copy_(made.token_embedding.weight[END])
    assert sample(made, [1], 12, GREEDY) == []


def frequencies(sampling: Sampling, logits: torch.Tensor, draws: int = 4000) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    chosen = torch.tensor([sampling.choose(logits, generator) for _ in range(draws)])
    return torch.bincount(chosen, minlength=logits.numel()) / draws


def choice_by_torch(sampling: Sampling, logits: torch.Tensor, generator: torch.Generator) -> int:
    """The same choice, step by step on the host, by torch.multinomial."""
    likeliest = int(logits.argmax())
    if sampling.temperature == 0:
        return likeliest
    logits = logits.float() / sampling.temperature
    if not torch.isfinite(logits[likeliest]):
        return likeliest
    if 0 < sampling.top_k < logits.numel():
        logits[logits < logits.topk(sampling.top_k).values[-1]] = -torch.inf
    if sampling.top_p < 1:
        ordered, order = logits.sort(descending=True)
        probabilities = ordered.softmax(0)
        logits[order[probabilities.cumsum(0) - probabilities >= sampling.top_p]] = -torch.inf
    return int(torch.multinomial(logits.softmax(0), 1, generator=generator))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(0.0, 0, 1.0), Sampling(1.0, 0, 1.0), Sampling(0.8, 12, 1.0), Sampling(1.3, 0, 0.9),
        Sampling(0.7, 30, 0.5), Sampling(2e-38, 5, 0.9),  # overflows for some of the logits
    ],
)  # fmt: skip
def test_ids_and_random_numbers_are_those_of_torchs_multinomial(sampling: Sampling, dtype: torch.dtype) -> None:
    ours, theirs = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    draw = torch.Generator().manual_seed(2)
    for scale in (1, 3, 8) * 30:
        logits = (scale * torch.randn(97, generator=draw)).to(dtype)
        assert sampling.choose(logits.clone(), ours) == choice_by_torch(sampling, logits, theirs)
    assert torch.equal(ours.get_state(), theirs.get_state())


LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -3.0])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature_divides_the_logits(temperature: float) -> None:
    expected = (LOGITS / temperature).softmax(0)
    torch.testing.assert_close(frequencies(Sampling(temperature, 0, 1.0), LOGITS), expected, atol=0.03, rtol=0)


def test_top_k_keeps_the_k_most_likely() -> None:
    expected = torch.cat([LOGITS[:2].softmax(0), torch.zeros(3)])
    torch.testing.assert_close(frequencies(Sampling(1.0, 2, 1.0), LOGITS), expected, atol=0.03, rtol=0)


def test_top_p_keeps_the_smallest_set_that_has_it() -> None:
    probabilities = LOGITS.softmax(0)  # 0.56 0.21 0.13 0.08 0.004
    for top_p, kept in ((0.5, 1), (0.6, 2), (0.85, 3), (1.0, 5)):
        expected = torch.cat([probabilities[:kept] / probabilities[:kept].sum(), torch.zeros(5 - kept)])
        torch.testing.assert_close(frequencies(Sampling(1.0, 0, top_p), LOGITS), expected, atol=0.03, rtol=0)


@pytest.mark.parametrize(
    ("values", "message"),
    [((-0.1, 0, 1.0), "temperature=-0.1"), ((1.0, -1, 1.0), "top_k=-1"), ((1.0, 0, 0.0), "top_p=0.0")],
)
def test_impossible_settings_are_refused(values: tuple[float, int, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(*values)


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("héllo 🙂 wörld", (), "héllo 🙂 wörld"),
        ("yes\n\n### Instruction: no", ("\n\n### Instruction:",), "yes"),
        ("a <|im_en> b", ("<|im_end|>",), "a <|im_en> b"),  # the beginning of a stop alone is text
        ("a <|im_end|> b", ("\nQ:", "<|im_end|>"), "a "),
        ("aab", ("ab",), "a"),
        ("ends in <|im", ("<|im_end|>",), "ends in <|im"),
    ],
)
def test_text_is_streamed_until_a_stop_string(text: str, stops: tuple[str, ...], expected: str) -> None:
    pieces = list(stream_text(iter(text.encode()), bytes, stops))
    assert "".join(pieces) == expected
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces)  # characters are given out whole


def test_a_character_cut_off_at_the_end_is_written_as_a_replacement() -> None:
    assert "".join(stream_text(iter("é".encode()[:1]), bytes)) == "\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_refused(bad: float, temperature: float) -> None:
    logits = torch.tensor([0.0, 1.0, bad, 2.0])
    with pytest.raises(SamplingFailed, match="not finite"):
        Sampling(temperature, 2, 0.9).choose(logits, torch.Generator())
    assert Sampling(temperature, 1, 0.9).choose(torch.tensor([0.0, -torch.inf, 2.0]), torch.Generator()) == 2


@pytest.mark.parametrize("temperature", [1e-6, 1e-39, 1e-320])
def test_a_temperature_next_to_0_takes_the_likeliest_token(temperature: float) -> None:
    logits = torch.tensor([-3.0, 30.0, 29.9])
    assert Sampling(temperature, 0, 1.0).choose(logits, torch.Generator()) == 1


@pytest.mark.parametrize("temperature", [float("nan"), float("inf"), -0.1])
def test_a_temperature_that_is_no_number_is_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature="):
        Sampling(temperature, 0, 1.0)


@pytest.mark.parametrize(
    ("pieces", "expected"), [([" ", "Yes", " it"], "Yes it"), (["", "  a"], " a"), (["a", " b"], "a b"), ([" "], "")]
)
def test_the_space_before_a_response_is_not_shown(pieces: list[str], expected: str) -> None:
    from llmtrain.inference.generate import without_first_space

    assert "".join(without_first_space(pieces)) == expected
