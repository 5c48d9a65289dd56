"""What is written for transformers splits text as we do."""

import base64
import json
import random
import re
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, GPT2Config, LlamaConfig, PreTrainedTokenizerFast

from llmtrain.hf.tokenizer_export import export_files, tokenizer_config, tokenizer_json
from llmtrain.tokenizer import Tokenizer
from llmtrain.tokenizer.bpe import END_OF_TEXT, for_oniguruma
from llmtrain.tokenizer.byte import Byte
from llmtrain.tokenizer.gpt2 import GPT2, RANKS
from llmtrain.tokenizer.huggingface import HuggingFace
from llmtrain.tokenizer.python4096 import Python4096
from llmtrain.tokenizer.sentencepiece import SentencePiece
from llmtrain.tokenizer.tiktoken import Tiktoken
from tests.helpers.tokenizers import CORPUS, EVERY, random_texts, train_sentencepiece


def from_file(path: Path, pattern: str) -> Tokenizer:
    return Tiktoken(encoding=str(path), pattern=pattern, end_of_text=END_OF_TEXT).build()


BUILD: dict[str, Callable[[], Tokenizer]] = {
    "byte": lambda: Byte().build(),
    "gpt2": lambda: GPT2().build(),
    "python4096": lambda: Python4096().build(),
    "cl100k": lambda: from_file(RANKS, "cl100k"),
    "o200k": lambda: from_file(RANKS, "o200k"),
}


KNOWN = [character for character in EVERY if unicodedata.category(character) not in ("Cn", "Co")]  # some 150,000


def export(tokenizer: Tokenizer, folder: Path, **options: Any) -> Path:
    for name, content in export_files(tokenizer, 1024, **options).items():
        (folder / name).write_text(content, encoding="utf-8")
    return folder


def assert_same(ours: Tokenizer, theirs: PreTrainedTokenizerFast, texts: Iterable[str]) -> None:
    texts = list(texts)
    for text, ids in zip(texts, theirs(texts, add_special_tokens=False)["input_ids"], strict=True):
        assert ours.encode(text).tolist() == ids, text


@pytest.mark.parametrize("name", BUILD)
def test_exported_patterns_split_text_as_ours(name: str, tmp_path: Path) -> None:
    ours = BUILD[name]()
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(export(ours, tmp_path) / "tokenizer.json"))
    assert_same(ours, theirs, random_texts(3000))
    assert_same(ours, theirs, [CORPUS[:300_000], Path(__file__).read_text(), "".join(KNOWN), " \n".join(KNOWN[::3])])
    assert_same(ours, theirs, ["\n" * n + " " * m + "x" * (n % 3) for n in range(0, 300, 23) for m in range(40)])
    assert_same(ours, theirs, ["0123456789" * 30, "a" * 3000, "ab" * 1500, " a" * 500, "\r\n" * 500])


def test_exported_merges_give_the_same_ids_for_random_ranks(tmp_path: Path) -> None:
    """Ranks at random, where a token is made of others in many ways, and of parts that overlap in a text."""
    rng = random.Random(0)
    checked = 0
    for number in range(60):
        tokens = [bytes([byte]) for byte in range(256)]
        letters = "ab" if number % 2 else "abc"
        while len(tokens) < 256 + 60:  # each of two before it, as training makes them
            shortest = [token for token in tokens if set(token) <= set(letters.encode()) and len(token) < 7]
            token = rng.choice(shortest) + rng.choice(shortest)
            if token not in tokens:
                tokens.append(token)
        path = tmp_path / "ranks.tiktoken"
        path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)))
        ours = from_file(path, "gpt2")
        theirs = PreTrainedTokenizerFast(tokenizer_file=str(export(ours, tmp_path) / "tokenizer.json"))
        assert_same(ours, theirs, ["".join(rng.choices(letters, k=rng.randint(1, 60))) for _ in range(300)])
        checked += len(tokens)
    assert checked == 60 * 316


@pytest.mark.parametrize(
    ("name", "config"), [("gpt2", GPT2Config()), ("cl100k", LlamaConfig()), ("byte", GPT2Config())]
)
def test_a_directory_loads_by_itself(name: str, config: Any, tmp_path: Path) -> None:
    """As who gets the export does it, with the configuration of a model beside it."""
    ours = BUILD[name]()
    config.save_pretrained(export(ours, tmp_path, chat_template="{% for m in messages %}{{ m.content }}{% endfor %}"))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert_same(ours, theirs, random_texts(800, seed=1))
    expected = [*ours.encode("one"), ours.end_of_text, *ours.encode("two\n "), ours.end_of_text]
    assert theirs(f"one{END_OF_TEXT}two\n {END_OF_TEXT}")["input_ids"] == expected
    assert (theirs.eos_token_id, theirs.model_max_length, len(theirs)) == (ours.end_of_text, 1024, ours.vocab_size)
    for text in random_texts(300, seed=2):
        assert theirs.decode(ours.encode(text).tolist()) == text
    assert theirs.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == "Hi"


def test_a_tokenizer_of_the_hub_is_exported_unchanged(byte_level: Path, tmp_path: Path) -> None:
    config = json.loads((byte_level / "tokenizer_config.json").read_text())
    config |= {"pad_token": "<|im_start|>", "auto_map": {"AutoTokenizer": ["theirs.Tokenizer", None]}}
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "tokenizer.json").write_bytes((byte_level / "tokenizer.json").read_bytes())
    (tmp_path / "in" / "tokenizer_config.json").write_text(json.dumps(config))
    ours = HuggingFace(path=str(tmp_path / "in"), end_of_text=None, version=2).build()
    assert tokenizer_json(ours).encode() == (byte_level / "tokenizer.json").read_bytes()
    written = tokenizer_config(ours, 64)
    assert written["pad_token"] == "<|im_start|>"
    assert "auto_map" not in written  # code of others
    assert "bos_token" not in written
    (tmp_path / "out").mkdir()
    theirs = AutoTokenizer.from_pretrained(export(ours, tmp_path / "out"))
    assert theirs.pad_token_id == 1
    assert_same(ours, theirs, random_texts(500, seed=3))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"user_defined_symbols": ["<sep>", "<|a|>"]},
        {"add_dummy_prefix": False},
        {"byte_fallback": False},
        {"split_digits": False, "remove_extra_whitespaces": True},
        {"model_type": "unigram", "allow_whitespace_only_pieces": False},
    ],
)
def test_exported_sentencepiece_tokenizers_give_the_same_ids(options: dict[str, Any], tmp_path: Path) -> None:
    path = train_sentencepiece(tmp_path / "tokenizer.model", **options)
    ours = SentencePiece(path=str(path), end_of_text=None, version=2).build()
    theirs = AutoTokenizer.from_pretrained(export(ours, tmp_path))
    texts = [*random_texts(1500, seed=4), *CORPUS[60_000:100_000].splitlines()]
    if options.get("model_type") == "unigram":  # runs of one character can be split in several ways with one score
        texts = [text for text in texts if not re.search(r"(.)\1\1", text, re.DOTALL)]
    assert_same(ours, theirs, texts)
    assert_same(ours, theirs, ["a <sep>b<|a|> <sep>", "<0x41>", "x <0x41>", "", " ", "   ", "▁▁", "▁ a  ▁"])
    expected = [1, *ours.encode("Hi there"), 2, 1, *ours.encode(" you")]
    assert theirs("<s>Hi there</s><s> you")["input_ids"] == expected
    assert (theirs.bos_token_id, theirs.eos_token_id) == (1, 2)
    for text in random_texts(200, seed=5):
        if options.get("byte_fallback", True) and not options.get("remove_extra_whitespaces"):
            assert theirs.decode(ours.encode(text).tolist()) == text


@pytest.mark.parametrize("options", [{"normalization_rule_name": "nmt_nfkc"}, {"model_type": "char"}])
def test_sentencepiece_models_that_the_format_cannot_hold_are_refused(options: dict[str, Any], tmp_path: Path) -> None:
    path = train_sentencepiece(tmp_path / "tokenizer.model", **options | {"vocab_size": 400})
    with pytest.raises(ValueError, match=r"cannot be written as tokenizer\.json"):
        tokenizer_json(SentencePiece(path=str(path), end_of_text=None, version=2).build())


def test_a_users_pattern_is_exported(tmp_path: Path) -> None:
    ours = from_file(RANKS, r"\p{L}{1,4}+|\s++$|\d{2}+|[\s\S]")
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(export(ours, tmp_path) / "tokenizer.json"))
    assert_same(ours, theirs, random_texts(1500, seed=6))
    with pytest.raises(ValueError, match=r"tokenizer\.pattern: cannot be written as tokenizer\.json: .* split"):
        tokenizer_json(from_file(RANKS, r"^.{1,3}|[\s\S]"))  # where a line begins, in the other engine
    with pytest.raises(ValueError, match=r"tokenizer\.pattern: cannot be written as tokenizer\.json: Oniguruma"):
        tokenizer_json(from_file(RANKS, r"\w+|(?s:.)"))


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (r"\p{N}{1,3}+", r"(?>\p{N}{1,3})"),
        (r"[a$\]]{2}+$", r"(?>[a$\]]{2})\z"),
        (r"a{2,}+\$", r"(?>a{2,})\$"),
        (r"a{2}b++", r"a{2}b++"),
    ],
)
def test_patterns_are_translated_for_the_other_engine(pattern: str, expected: str) -> None:
    assert for_oniguruma(pattern) == expected


def test_special_tokens_keep_their_ids(tmp_path: Path) -> None:
    path = tmp_path / "holes.tiktoken"
    lines = [f"{base64.b64encode(bytes([byte])).decode()} {byte}\n" for byte in range(256)]
    path.write_text("".join(lines) + f"{base64.b64encode(b'ab').decode()} 300\n")  # ids are left out
    ours = from_file(path, "gpt2")
    theirs = AutoTokenizer.from_pretrained(export(ours, tmp_path))
    assert theirs(f"ab{END_OF_TEXT}")["input_ids"] == [300, 301]
    assert theirs.eos_token_id == 301
