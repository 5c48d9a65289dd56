"""Text of every kind, and tokenizers that are trained on some of it."""

import io
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

CORPUS = "\n".join(topics.values())

WORDS = "a b e the The THE ing 's 'LL ’s 'RE 1 12 1234 3.14 _ x_y é e\u0301 ß ſ K ﬁ ǅ Ⅷ ² Ñ"
SYMBOLS = "世界 日本語 こんにちは русский עברית ไทย 🙂 👩‍👩‍👧 - / // ... !? 。 、 「 $ += {} def self.x"
FRAGMENTS = [
    *WORDS.split(" "),
    *SYMBOLS.split(" "),
    *["\0", "\a", "\x7f", "\u0085", "\u200b", "\ufeff", "\ufffd", "\U0010ffff", "\u0301", "\x1b[0m"],
    *[" ", "  ", "    ", "\n", "\n\n", "\r\n", "\t", "\v", "\x1c", "\u00a0", "\u2003", "\u2028", "\u3000", " " * 30],
]
EVERY = [chr(i) for i in range(0x110000) if not 0xD800 <= i < 0xE000]


def random_texts(count: int, seed: int = 0) -> Iterator[str]:
    """Words and spaces of every class, any characters at all, repetitions, and stretches of real text."""
    rng = random.Random(seed)
    for number in range(count):
        match number % 5:
            case 0 | 1:
                yield "".join(rng.choices(FRAGMENTS, k=rng.randint(1, 40)))
            case 2:
                yield "".join(rng.choices(EVERY, k=rng.randint(1, 30)))
            case 3:
                yield "".join(rng.choice("abc \n\t01'-") * rng.randint(1, 9) for _ in range(12))
            case _:
                start = rng.randrange(len(CORPUS) - 300)
                yield CORPUS[start : start + rng.randint(1, 300)]


Save = Callable[..., Path]


@pytest.fixture(scope="session")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory as of a small GPT-2: byte-level BPE, two special tokens and one that is text."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>", "<|im_start|>"]
    tokenizer.train_from_iterator(
        [CORPUS[:60_000]],
        trainers.BpeTrainer(vocab_size=700, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer.add_tokens([tokenizers.AddedToken("<think>", normalized=False)])
    return save(tmp_path_factory.mktemp("byte_level"), tokenizer, eos_token="<|endoftext|>", bos_token=None)


@pytest.fixture(scope="session")
def unigram(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Unigram with byte fallback, its special tokens in its vocabulary, as files made from SentencePiece have them."""
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    tokenizer.normalizer = normalizers.NFC()
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.train_from_iterator(
        CORPUS[:60_000].splitlines(),
        trainers.UnigramTrainer(vocab_size=700, special_tokens=special, unk_token="<unk>", show_progress=False),
    )
    spec = json.loads(tokenizer.to_str())
    spec["model"]["byte_fallback"] = True
    spec["pre_tokenizer"]["split"] = False
    spec["added_tokens"] = spec["added_tokens"][:3]
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(spec))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    eos = {"__type": "AddedToken", "content": "</s>", **dict.fromkeys(("lstrip", "rstrip", "single_word"), False)}
    return save(tmp_path_factory.mktemp("unigram"), tokenizer, eos_token=eos, bos_token="<s>")


def save(folder: Path, tokenizer: tokenizers.Tokenizer, **config: Any) -> Path:
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def train_sentencepiece(path: Path, **options: Any) -> Path:
    """A model in the manner of Llama 2's, but for what ``options`` say."""
    model = io.BytesIO()
    like_llama = {
        "model_type": "bpe", "vocab_size": 700, "byte_fallback": True, "split_digits": True,
        "normalization_rule_name": "identity", "remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True,
        "control_symbols": ["<ctl>"],
    }  # fmt: skip
    lines = iter(CORPUS[:60_000].splitlines())
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_writer=model, minloglevel=2, num_threads=1, **like_llama | options
    )
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_sentencepiece(tmp_path_factory.mktemp("llama") / "tokenizer.model")


INST = (  # in the manner of Llama 2's and Mistral's
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)


@pytest.fixture(scope="session")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """BPE of pieces, ``▁`` put before a text by the normalizer and ``<s>`` by the post-processor, with a template."""
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.train_from_iterator(
        CORPUS[:60_000].splitlines(),
        trainers.BpeTrainer(vocab_size=800, special_tokens=special, show_progress=False),
    )
    spec = json.loads(tokenizer.to_str())
    spec["pre_tokenizer"] = None
    spec["added_tokens"] = spec["added_tokens"][:3]
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(spec))
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "chat_template": INST}
    return save(tmp_path_factory.mktemp("pieces"), tokenizer, tokenizer_class="PreTrainedTokenizerFast", **names)
