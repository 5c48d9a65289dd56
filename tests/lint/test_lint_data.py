"""What training and evaluation would see of the data."""

import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llmtrain import Run
from llmtrain.config.assemble import Parts
from llmtrain.data import IGNORE
from llmtrain.data.order.permutation import order
from llmtrain.data.sequences import Rows, Sequences, Stream
from llmtrain.lint import Case, lint
from llmtrain.lint.overlap import STRETCH, number_in_all, window_hashes
from tests.lint.findings import QUIET, find, parts_of, with_corpus

# --- masked targets ----------------------------------------------------------------------------------------------


class Masked(Stream):
    """Sequences of which some, by number, have no target."""

    masked: np.ndarray

    @classmethod
    def where(cls, sequences: Sequences, is_masked: Callable[[np.ndarray], np.ndarray]) -> "Masked":
        tokens = np.concatenate([sequences.gather(np.arange(len(sequences)))[0].ravel(), [0]])
        masked = cls([tokens.astype(np.uint16)], sequences.sequence_length)
        masked.masked = is_masked(np.arange(len(sequences)))
        return masked

    def gather(self, indices: np.ndarray) -> Rows:
        inputs, targets, *_ = super().gather(indices)
        targets[self.masked[indices]] = IGNORE
        return Rows(inputs, targets)


def masking(part: str, is_masked: Callable[[np.ndarray], np.ndarray]) -> Callable[[Parts], Parts]:
    return lambda parts: with_corpus(**{part: Masked.where(getattr(parts.corpus, part), is_masked)})(parts)


def test_training_data_with_few_targets_are_reported() -> None:
    found = find(change=masking("train", lambda n: n >= 0))["data"]
    assert found.level == "error"
    assert found.message.startswith("data=python_docs: every target of the ")
    assert "training sequences looked at is masked (-100): the loss would be 0.0" in found.message
    assert "data.sequence_length=64" in found.message
    found = find(change=masking("train", lambda n: n % 4 == 0))["data"]
    assert found.level == "warning"
    share = float(re.findall(r"([\d.]+)% of the \d+ training sequences looked at have no target", found.message)[0])
    assert 18 < share < 32
    assert find(change=masking("train", lambda n: n % 20 == 0)) == {}


def test_masks_are_searched_in_the_sequences_that_training_visits() -> None:
    """Of 2 steps of 4 sequences, exactly the ones that they will take."""
    short = ("loop.max_steps=2", "accumulation.batch_size=4", "accumulation.micro_batch_size=4", "runtime.seed=5")
    sequences = len(parts_of(Run.compose(*QUIET)).corpus.train)
    taken = order(np.arange(8), sequences, 5, True)
    assert find(*short, change=masking("train", lambda n: ~np.isin(n, taken))) == {}
    found = find(*short, change=masking("train", lambda n: np.isin(n, taken)))["data"]
    assert found.level == "error"
    assert "every target of the 8 training sequences" in found.message


def test_validation_data_without_targets_are_reported() -> None:
    found = find(change=masking("validation", lambda n: n >= 0))["data"]
    assert found.level == "error"
    assert "the validation loss would be 0.0" in found.message
    assert find("loop.eval_every=0", change=masking("validation", lambda n: n >= 0)) == {}
    first = masking("validation", lambda n: n < 16)  # what an evaluation of 2 batches of 8 reads
    assert find("loop.eval_batches=2", change=first)["data"].level == "error"
    assert find("loop.eval_batches=3", change=first) == {}


# --- validation in training --------------------------------------------------------------------------------------


def leaking(share: float) -> Callable[[Parts], Parts]:
    """The first part of the validation data is training data."""

    def change(parts: Parts) -> Parts:
        assert parts.corpus.validation is not None
        streams = [s.gather(np.arange(len(s)))[0].ravel() for s in (parts.corpus.train, parts.corpus.validation)]
        train, validation = streams
        cut = int(len(validation) * share)
        mixed = np.concatenate([train[1001 : 1001 + cut], validation[cut:]])
        return with_corpus(validation=Stream([mixed.astype(np.uint16)], 64))(parts)

    return change


def test_validation_data_found_in_training_are_reported() -> None:
    found = find(change=leaking(1.0))["data"]
    assert found.level == "error"
    assert "from beginning to end" in found.message
    found = find(change=leaking(0.5))["data"]
    assert found.level == "warning"
    share = float(re.findall(r": ([\d.]+)% of the validation data are in the training data", found.message)[0])
    assert 49 < share < 56  # the rest has been cleared of what is in the training text
    assert re.search(r"in all \d+k training tokens", found.message)
    assert find("loop.eval_every=0", change=leaking(1.0)) == {}


def test_a_large_corpus_is_sampled() -> None:
    """50 million tokens: a part of them is looked through, without a false alarm."""
    generator = np.random.default_rng(0)
    train = generator.integers(0, 256, 50_000_000, dtype=np.uint16)
    fresh = generator.integers(0, 256, 2_000_000, dtype=np.uint16)

    def corpus(validation: np.ndarray) -> Callable[[Parts], Parts]:
        return with_corpus(train=Stream([train], 512), validation=Stream([validation], 512))

    assert find("model.context_length=512", change=corpus(fresh)) == {}
    run = Run.compose(*QUIET, "model.context_length=512")
    parts = corpus(train[20_000_000:22_000_000])(parts_of(run))
    (found,) = lint(Case.of(run, parts, ()))
    assert found.level == "warning"
    share = float(re.findall(r"about ([\d.]+)% of the validation data", found.message)[0])
    assert 85 <= share <= 100
    assert re.search(
        r"1,9\d\d stretches of 64 tokens were looked for in 67\.\d% of the 50.0M training tokens", found.message
    )


def test_windows_have_equal_hashes_only_for_equal_tokens() -> None:
    """Equal where the tokens are, and only there."""
    tokens = np.random.default_rng(0).integers(0, 2, 3000)
    tokens[1500:1700] = tokens[100:300]
    hashes = window_hashes(tokens)
    windows = [tuple(tokens[i : i + STRETCH]) for i in range(len(tokens) - STRETCH + 1)]
    assert len(hashes) == len(windows)
    numbers = dict(zip(windows, hashes.tolist(), strict=True))
    assert [numbers[window] for window in windows] == hashes.tolist()
    assert len(set(numbers.values())) == len(numbers) == len(windows) - (200 - STRETCH + 1)


def test_a_share_found_in_a_sample_is_extrapolated() -> None:
    single = np.array([1] * 10 + [0] * 90)
    assert number_in_all(single, 1.0) == 10
    assert number_in_all(single, 0.1) == pytest.approx(100)  # each once in the data: a tenth of them in a tenth
    assert number_in_all(single, 0.5) == pytest.approx(20)
    frequent = np.array([50] * 10 + [0] * 90)
    assert number_in_all(frequent, 0.1) == 10  # boilerplate is in every part
    assert number_in_all(np.zeros(100, int), 0.1) == 0


# --- amounts -----------------------------------------------------------------------------------------------------


def test_many_epochs_are_reported() -> None:
    """359,595 tokens with Python 3.11.7's documentation: 5,618 sequences of 64; 8 a step."""
    message = find("loop.max_steps=3000")["loop.max_steps"].message
    tokens = re.findall(r"([\d,]+) training tokens", message)[0]
    sequences = int(tokens.replace(",", "")) // 64
    epochs = 3000 * 8 / sequences
    assert message == (
        f"loop.max_steps=3000: goes {epochs:.3g} times through {tokens} training tokens: beyond 4 epochs repeated text "
        f"helps less and less, and is memorised; more text, loop.max_steps={4 * sequences // 8}, or, if it is "
        f"meant, loop.max_steps=null loop.epochs={math.ceil(epochs)}"
    )
    assert find(f"loop.max_steps={4 * sequences // 8 - 9}") == {}
    assert find("loop.max_steps=null", "loop.epochs=20") == {}


def test_a_batch_larger_than_the_data_is_reported() -> None:
    found = find("accumulation.batch_size=6000", "loop.max_steps=2")
    message = found["accumulation.batch_size"].message
    there = re.findall(r"a step of 6000 sequences has some of them more than once, since there are ([\d,]+)", message)
    assert find(f"accumulation.batch_size={there[0].replace(',', '')}", "loop.max_steps=2", "loop.eval_every=1") == {}


def test_positions_that_are_never_trained_are_reported() -> None:
    message = find("data.sequence_length=31")["model.context_length"].message
    assert "positions from 31 on are never trained" in message
    assert "model.context_length=31, or longer sequences" in message
    assert find("data.sequence_length=32") == {}
    assert find("data.sequence_length=16", "weights=checkpoint", "weights.path=x") == {}  # trained by another run


def test_a_vocabulary_larger_than_the_tokenizers_is_reported() -> None:
    message = find("model.vocab_size=50257")["model.vocab_size"].message
    assert "the tokenizer has 257 ids; the other 50,000 rows" in message
    assert find("model.vocab_size=320") == {}


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_very_little_validation_data_are_reported(rows: int) -> None:
    """Of sequences shorter than a stretch: too little to compare, or too little to judge by."""

    def change(parts: Parts) -> Parts:
        train = parts.corpus.train.gather(np.arange(rows))[0].ravel().astype(np.uint16)
        return with_corpus(validation=Stream([np.append(train, 0)], 32))(parts)

    assert find("data.sequence_length=32", change=change) == {}


# --- the split ---------------------------------------------------------------------------------------------------


def test_a_split_that_is_no_fair_sample_is_reported(tmp_path: Path) -> None:
    """Three small files in one alphabet, and the large last one in another."""
    generator = np.random.default_rng(0)
    for number, letters in enumerate(("abcdefgh ", "bcdefghi ", "cdefghij ", "абвгдежз ")):
        text = "".join(generator.choice(list(letters), 20_000 * (1 + 2 * (number == 3))))
        (tmp_path / f"{number}.txt").write_text(text, encoding="utf-8")
    common = ("data=text", f"data.path={tmp_path}", "data.validation_fraction=0.25", "tokenizer=byte")
    former = find(*common, "data.split=documents")
    assert re.search(
        r"0\.25: 6\d\.\d% of the tokens validate, .* data\.split=tokens", former["data.validation_fraction"].message
    )
    assert "of another language or kind than the training text" in former["data.path"].message
    assert find(*common) == {}
