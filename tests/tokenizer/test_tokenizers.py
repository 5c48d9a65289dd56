"""Tokenizers against published ids, round trips and their error messages."""

import base64
import hashlib
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import tiktoken_ext.openai_public as published

from llmtrain.data.python_docs import read_topics
from llmtrain.tokenizer import CUTS, LONGEST_WORD, Tokenizer, split_long_words
from llmtrain.tokenizer.bpe import END_OF_TEXT, PATTERNS, read_ranks
from llmtrain.tokenizer.byte import Byte
from llmtrain.tokenizer.gpt2 import GPT2, RANKS
from llmtrain.tokenizer.python4096 import RANKS as PYTHON_RANKS
from llmtrain.tokenizer.python4096 import Python4096
from llmtrain.tokenizer.tiktoken import Tiktoken

TEXTS = [
    "",
    " ",
    "Hello, I am",
    "It's 12,345 o'clock;\r\n\r\n\tdef f(x):  return x\n\n",
    "naïve café — 你好,世界。 🙂👩‍👩‍👧 \u00a0\u2003x \x07",
    "<|endoftext|> is text here",
]


@pytest.fixture(scope="module")
def gpt2() -> Tokenizer:
    return GPT2().build()


@pytest.fixture
def ranks_file(tmp_path: Path) -> Path:
    """Bytes and one merge: ids 0 … 255, and 256 for "ab"."""
    path = tmp_path / "small.tiktoken"
    tokens = [bytes([i]) for i in range(256)] + [b"ab"]
    path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)))
    return path


def from_file(path: Path, pattern: str | None = "gpt2", end_of_text: str = END_OF_TEXT) -> Tiktoken:
    return Tiktoken(encoding=str(path), pattern=pattern, end_of_text=end_of_text)


# --- gpt2 --------------------------------------------------------------------------------------------------------


def test_gpt2_ranks_are_the_published_ones() -> None:
    digest = hashlib.sha256(RANKS.read_bytes()).hexdigest()
    assert digest == "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"  # tiktoken's own check


def test_gpt2_has_the_published_ids(gpt2: Tokenizer) -> None:
    ids = gpt2.encode("Hello, I am")
    assert ids.dtype == np.uint32
    assert ids.tolist() == [15496, 11, 314, 716]
    assert gpt2.encode("Every effort moves you").tolist() == [6109, 3626, 6100, 345]
    assert (gpt2.vocab_size, gpt2.end_of_text) == (50257, 50256)
    assert gpt2.decode([15496, 11, 50256]) == "Hello,<|endoftext|>"


def test_gpt2_merges_as_the_reference_algorithm() -> None:
    """Against byte-pair merging written out (Sennrich et al. 2016), on words that need many merges."""
    ranks = read_ranks(RANKS)
    tokenizer = GPT2().build()
    for word in ["antidisestablishmentarianism", " internationalisation", "ßtraße", "xxxxxxxxxxxxxxxx", "日本語"]:
        parts = [bytes([byte]) for byte in word.encode()]
        while pairs := [(ranks[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in ranks]:
            _, i = min(pairs)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        assert tokenizer.encode(word).tolist() == [ranks[part] for part in parts]


# --- python4096 --------------------------------------------------------------------------------------------------


def test_python4096_fits_two_bytes_and_the_text_that_it_is_for() -> None:
    tokenizer = Python4096().build()
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (4096, 4095)
    text = " ".join(read_topics("python_docs").values())
    assert len(text.encode()) / len(tokenizer.encode(text)) > 3.4
    assert tokenizer.encode("the value of the function").size == 5


def test_every_token_of_python4096_is_a_merge_of_two_earlier_ones() -> None:
    ranks = read_ranks(PYTHON_RANKS)
    assert sorted(ranks.values()) == list(range(4095))
    for token, rank in ranks.items():
        parts = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        assert len(token) == 1 or any(max(ranks.get(a, rank), ranks.get(b, rank)) < rank for a, b in parts), token


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", ["gpt2", "python4096", "byte"])
def test_texts_survive_a_round_trip(name: str, text: str) -> None:
    tokenizer = {"gpt2": GPT2(), "python4096": Python4096(), "byte": Byte()}[name].build()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids.tolist()) == text
    assert ids.dtype == np.uint32
    assert not (ids == tokenizer.end_of_text).any()  # special tokens in a text are ordinary characters


def test_a_cut_character_is_decoded_as_its_bytes(gpt2: Tokenizer) -> None:
    ids = gpt2.encode("🙂").tolist()
    assert gpt2.decode_bytes(ids[:1]) == "🙂".encode()[:2]
    assert gpt2.decode(ids[:1]) == "\ufffd"


@pytest.mark.parametrize("name", ["gpt2", "python4096", "byte"])
def test_the_only_special_token_ends_a_text(name: str) -> None:
    tokenizer = {"gpt2": GPT2(), "python4096": Python4096(), "byte": Byte()}[name].build()
    assert dict(tokenizer.special_tokens) == {END_OF_TEXT: tokenizer.end_of_text}
    assert (tokenizer.bos, tokenizer.chat_template) == (None, None)


@pytest.mark.parametrize("name", ["gpt2", "python4096", "byte"])
def test_ids_beyond_the_vocabulary_decode_to_a_replacement_character(name: str) -> None:
    """A model's vocabulary may be larger, and an untrained one finds its ids."""
    tokenizer = {"gpt2": GPT2(), "python4096": Python4096(), "byte": Byte()}[name].build()
    assert tokenizer.decode([tokenizer.vocab_size, tokenizer.vocab_size + 40]) == "\ufffd\ufffd"


def test_several_threads_encode_the_same(gpt2: Tokenizer) -> None:
    texts = [f"{i} {'the quick brown fox ' * i}" for i in range(40)]
    expected = [gpt2.encode(text).tolist() for text in texts]
    with ThreadPoolExecutor(8) as pool:
        assert [ids.tolist() for ids in pool.map(gpt2.encode, texts)] == expected


# --- byte --------------------------------------------------------------------------------------------------------


def test_byte_ids_are_the_bytes() -> None:
    tokenizer = Byte().build()
    assert tokenizer.encode("aé").tolist() == [97, 0xC3, 0xA9]
    assert tokenizer.decode([97, 0xC3]) == "a\ufffd"
    assert tokenizer.decode([97, 256]) == "a<|endoftext|>"
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (257, 256)


# --- tiktoken ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "cl100k", "o200k"])
def test_patterns_are_the_published_ones(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(published, "load_tiktoken_bpe", lambda *_, **__: {})  # their tables would be downloaded
    monkeypatch.setattr(published, "data_gym_to_mergeable_bpe_ranks", lambda *_, **__: {})
    constructor = {"gpt2": published.gpt2, "cl100k": published.cl100k_base, "o200k": published.o200k_base}[name]
    assert PATTERNS[name] == constructor()["pat_str"]


def test_file_with_gpt2_ranks_is_gpt2(gpt2: Tokenizer) -> None:
    by_name = Tiktoken(encoding="gpt2", pattern=None, end_of_text=END_OF_TEXT).build()
    assert from_file(RANKS).build().fingerprint == by_name.fingerprint == gpt2.fingerprint


def test_ids_are_those_of_a_ranks_file(ranks_file: Path) -> None:
    tokenizer = from_file(ranks_file, end_of_text="<end>").build()
    assert tokenizer.encode("abba").tolist() == [256, 98, 97]
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (258, 257)
    assert tokenizer.decode([256, 257]) == "ab<end>"


def test_texts_are_cut_with_known_patterns_alone(ranks_file: Path) -> None:
    assert from_file(ranks_file).build().cuts == CUTS
    assert from_file(ranks_file, pattern=r"(?s:.{1,5})").build().cuts == ()


def test_unused_ids_decode_to_a_replacement_character(ranks_file: Path) -> None:
    with ranks_file.open("a") as file:
        file.write(f"{base64.b64encode(b'cd').decode()} 300\n")
    tokenizer = from_file(ranks_file).build()
    assert tokenizer.vocab_size == 302
    assert tokenizer.decode([97, 299, 300, 301]) == "a\ufffdcd<|endoftext|>"


def test_fingerprint_follows_whatever_decides_the_ids(ranks_file: Path, tmp_path: Path) -> None:
    lines = ranks_file.read_text().splitlines(keepends=True)
    shuffled, merged = tmp_path / "shuffled.tiktoken", tmp_path / "merged.tiktoken"
    shuffled.write_text("".join(reversed(lines)))
    merged.write_text("".join(lines[:-1]) + f"{base64.b64encode(b'ba').decode()} 256\n")
    fingerprint = from_file(ranks_file).build().fingerprint
    assert from_file(shuffled).build().fingerprint == fingerprint
    others = [
        from_file(merged),
        from_file(ranks_file, pattern="cl100k"),
        from_file(ranks_file, end_of_text="<end>"),
        GPT2(),
        Byte(),
    ]
    assert len({fingerprint, *(other.build().fingerprint for other in others)}) == 6


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"x\.tiktoken: cut or damaged: byte 0x00 has no token"),
        (b"IQ== 0\nIg==", "not a .tiktoken file"),
        (b"IQ== zero\n", "not a .tiktoken file"),
        (b"@ 1\n", "not a .tiktoken file"),
        (b"IQ== 0\nIg== 0\n", "a rank occurs twice"),
        (b"IQ== 0\n", "cut or damaged: byte 0x00 has no token"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.tiktoken"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        from_file(path).build()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenizer\.encoding=.*nowhere\.tiktoken: No such file"):
        from_file(tmp_path / "nowhere.tiktoken").build()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"encoding": "a.tiktoken"}, "pattern=None: a.tiktoken holds merge ranks only"),
        ({"pattern": "gpt2"}, "pattern='gpt2': encoding=cl100k_base brings its own"),
        ({"end_of_text": ""}, "end_of_text='': must not be empty"),
    ],
)
def test_values_that_do_not_match_are_refused(values: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Tiktoken(**{"encoding": "cl100k_base", "pattern": None, "end_of_text": END_OF_TEXT} | values)


def test_unusable_values_are_refused(ranks_file: Path) -> None:
    with pytest.raises(ValueError, match=r"encoding=gpt5: no such encoding; there are gpt2, .*cl100k_base"):
        Tiktoken(encoding="gpt5", pattern=None, end_of_text=END_OF_TEXT).build()
    with pytest.raises(ValueError, match=r"end_of_text=<end>: not a special token of gpt2; there are <\|endoftext\|>"):
        Tiktoken(encoding="gpt2", pattern=None, end_of_text="<end>").build()
    with pytest.raises(ValueError, match="end_of_text=ab: an ordinary token"):
        from_file(ranks_file, end_of_text="ab").build()
    with pytest.raises(ValueError, match=r"pattern=\(: not a regular expression"):
        from_file(ranks_file, pattern="(").build()
    with pytest.raises(ValueError, match="pattern=cl100: loses text"):
        from_file(ranks_file, pattern="cl100").build()


def test_a_failed_download_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(ValueError, match=r"o200k_base: tiktoken could not download it .* path of a \.tiktoken file"):
        Tiktoken(encoding="o200k_base", pattern=None, end_of_text=END_OF_TEXT).build()


# --- long words --------------------------------------------------------------------------------------------------


def test_long_words_are_cut_and_other_text_is_not() -> None:
    usual = "A word, and more words; 12,345 of them.\n\n" * 1000 + "x" * 4000 + " end"
    assert split_long_words(usual) == [usual]
    for run in ("x", " ", "!", "世", "ab", "\n", "9"):
        for length in (LONGEST_WORD * 3, LONGEST_WORD * 5 + 77):
            text = f"{usual} {(run * length)[:length]} and {usual}"
            parts = split_long_words(text)
            assert "".join(parts) == text
            assert len(parts) >= length // LONGEST_WORD - 1
            assert all(len(part) >= LONGEST_WORD for part in parts[:-1])


def test_a_run_of_one_letter_takes_linear_time_and_few_more_tokens() -> None:
    tokenizer = GPT2().build()
    ids = tokenizer.encode("a" * (1 << 19))
    assert tokenizer.decode(ids.tolist()) == "a" * (1 << 19)
    assert len(ids) == 1 << 17  # four letters each, as in a short run
