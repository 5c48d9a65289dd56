"""Export of any tokenizer as a ``tokenizer.json``, so that transformers splits text exactly as we do."""

import json
import random
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from types import MappingProxyType
from typing import Any

from llmtrain.base.checks import needing_package
from llmtrain.tokenizer import Tokenizer
from llmtrain.tokenizer.as_transformers import added_token, post_processor
from llmtrain.tokenizer.bpe import BPE, PATTERNS, for_oniguruma
from llmtrain.tokenizer.byte import ByteTokenizer
from llmtrain.tokenizer.directory import CONFIG, TEMPLATE
from llmtrain.tokenizer.huggingface import HuggingFaceTokenizer
from llmtrain.tokenizer.safe_cuts import QWEN_2
from llmtrain.tokenizer.sentencepiece import SentencePieceTokenizer
from llmtrain.tokenizer.sentencepiece_model import Algorithm, PieceKind, SentencePieceModel
from llmtrain.tokenizer.token_bytes import SPACE, flatten, to_byte_level

FILE = "tokenizer.json"

# Keys kept from the tokenizer that came with a model: tokens that pad, mask and separate its input.
KEPT = (
    "pad_token", "unk_token", "sep_token", "cls_token", "mask_token", "additional_special_tokens",
    "extra_special_tokens", "padding_side", "model_input_names",
)  # fmt: skip

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}

TIE = 1e-3  # between scores in fp32 of some tens to hundreds

SAMPLES = 300  # random texts that a converted tokenizer is compared on
WORDS = "a b e the The THE ing 's 'LL ’s 1 12 1234 3.14 _ x_y é e\u0301 ß ſ K ﬁ ǅ Ⅷ ² Ñ"
SYMBOLS = "世界 日本語 こんにちは русский עברית ไทย 🙂 👩‍👩‍👧 - / // ... !? 。 、 「 $ += <s> </s> {} ▁ ▁▁"
FRAGMENTS = [
    *WORDS.split(" "),
    *SYMBOLS.split(" "),
    *["\0", "\a", "\x7f", "\u0085", "\u200b", "\ufeff", "\ufffd", "\U0010ffff", "\u0301"],
    *[" ", "  ", "    ", "\n", "\n\n", "\r\n", "\t", "\v", "\x1c", "\u00a0", "\u2003", "\u2028", "\u3000", " " * 30],
]


def tokenizer_json(tokenizer: Tokenizer, marks: Mapping[str, int] = MappingProxyType({})) -> str:
    """The content of ``tokenizer.json``; ``marks``: ordinary tokens that a chat template uses as special ones, by name.

    Raises ValueError for a tokenizer that the format cannot express.
    """
    match tokenizer:
        case HuggingFaceTokenizer():
            return tokenizer.to_json(marks)
        case ByteTokenizer():
            model = _bpe({bytes([byte]): byte for byte in range(256)}, tokenizer.special_tokens)
            spec = _spec(_byte_level(None), model | {"ignore_merges": False}, BYTE_LEVEL)  # words are never one token
        case BPE():
            return _bpe_json(tokenizer)
        case SentencePieceTokenizer():
            spec = _sentencepiece_spec(tokenizer.model, tokenizer.scheme)
            names = {id: name for name, id in tokenizer.special_tokens.items()}
            spec["post_processor"] = post_processor([(names[id], id) for id in tokenizer.prefix])
        case _:
            raise ValueError(f"{type(tokenizer).__name__} cannot be written as {FILE}")
    text = _dump(spec, {**tokenizer.special_tokens, **marks})
    if isinstance(tokenizer, SentencePieceTokenizer):
        defined = [piece.text for piece in tokenizer.model.pieces if piece.kind is PieceKind.USER_DEFINED]
        _check_equal(tokenizer, text, f"tokenizer.path={tokenizer.file}", defined[:50])
    return text


def tokenizer_config(tokenizer: Tokenizer, model_max_length: int, chat_template: str | None = None) -> dict[str, Any]:
    """The content of ``tokenizer_config.json``; ``chat_template``: None for the tokenizer's own."""
    kept: dict[str, Any] = {}
    if isinstance(tokenizer, HuggingFaceTokenizer):
        kept = {key: value for key, value in tokenizer.directory.tokenizer_config.items() if key in KEPT}
    names = {id: name for name, id in tokenizer.special_tokens.items()}
    config = kept | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": model_max_length,
        "clean_up_tokenization_spaces": False,
        "eos_token": names[tokenizer.end_of_text],
    }
    if tokenizer.bos is not None:
        config["bos_token"] = names[tokenizer.bos]
    config |= {role: name for role, name in tokenizer.named_tokens.items() if role not in kept}
    template = tokenizer.chat_template if chat_template is None else chat_template
    return config if template is None else config | {"chat_template": template}


def export_files(
    tokenizer: Tokenizer,
    model_max_length: int,
    chat_template: str | None = None,
    marks: Mapping[str, int] = MappingProxyType({}),
) -> dict[str, str]:
    """Names and contents of the tokenizer files in an exported directory; ``marks``: see :func:`tokenizer_json`."""
    config = tokenizer_config(tokenizer, model_max_length, chat_template)
    contents = {FILE: tokenizer_json(tokenizer, marks)}
    if template := config.get("chat_template"):
        contents[TEMPLATE] = template
    return contents | {CONFIG: json.dumps(config, indent=2, ensure_ascii=False) + "\n"}


def splits_as_qwen(source: str) -> bool:
    """True if the ``tokenizer.json`` in ``source`` splits text as transformers' ``Qwen2Tokenizer`` does."""
    spec = json.loads(source)
    steps = flatten(spec.get("pre_tokenizer"), "pretokenizers")
    pattern = steps[0].get("pattern", {}).get("Regex") if steps else None
    model = spec["model"]
    affixes = [model.get(key) for key in ("continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")]
    return (
        (spec.get("normalizer") or {}).get("type") == "NFC"
        and [step["type"] for step in steps] == ["Split", "ByteLevel"]
        and pattern == QWEN_2
        and not steps[1].get("add_prefix_space")
        and model.get("type") == "BPE"
        and not any(affixes)
        and not model.get("ignore_merges")
    )


def _dump(spec: dict[str, Any], special_tokens: Mapping[str, int]) -> str:
    added = sorted(special_tokens.items(), key=lambda item: item[1])
    spec["added_tokens"] = [added_token(name, id) for name, id in added]
    return json.dumps(spec, ensure_ascii=False, indent=2) + "\n"


def _spec(pre_tokenizer: Any, model: Any, decoder: Any, normalizer: Any = None) -> dict[str, Any]:
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": decoder,
        "model": model,
    }


def _sequence(key: str, steps: list[Any]) -> Any:
    if len(steps) < 2:
        return steps[0] if steps else None
    return {"type": "Sequence", key: steps}


# --- byte-level BPE ----------------------------------------------------------------------------------------------


def _bpe_json(tokenizer: BPE) -> str:
    encoding = tokenizer.encoding
    model = _bpe(encoding._mergeable_ranks, tokenizer.special_tokens)
    spec = _spec(_byte_level(encoding._pat_str), model, BYTE_LEVEL)
    text = _dump(spec, tokenizer.special_tokens)
    if encoding._pat_str not in PATTERNS.values():  # the two regex engines may differ on it
        _check_equal(tokenizer, text, "tokenizer.pattern")
    return text


def _byte_level(pattern: str | None) -> dict[str, Any]:
    """The pre-tokenizer that splits by ``pattern`` and turns text into bytes."""
    if pattern is None:
        return BYTE_LEVEL
    regex = {"Regex": for_oniguruma(pattern)}
    split = {"type": "Split", "pattern": regex, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, BYTE_LEVEL]}


def _bpe(ranks: Mapping[bytes, int], special_tokens: Mapping[str, int]) -> dict[str, Any]:
    """A BPE model that merges as tiktoken does.

    tiktoken joins any two neighbours that make a token, the lowest rank first; so the merges list every pair of tokens
    that makes a token.  A word that is a token itself is not split at all (``ignore_merges``).  Special tokens are in
    the vocabulary too: otherwise the library would number them after all others.
    """
    by_rank = sorted(ranks, key=ranks.__getitem__)
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": True,
        "vocab": {to_byte_level(token): ranks[token] for token in by_rank} | dict(special_tokens),
        "merges": [" ".join(map(to_byte_level, pair)) for token in by_rank for pair in _pairs(token, ranks)],
    }


def _pairs(token: bytes, ranks: Mapping[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """Every pair of tokens that makes ``token``, in an order that resolves ties as tiktoken does.

    Of two pairs that overlap in a text (xy and yz, both ``token``) tiktoken joins the left one, the library the one
    listed first.  Pairs overlap where one splits ``token`` i bytes after its start, the other i bytes before its end,
    and ``token`` starts and ends with the same i bytes.
    """
    size = len(token)
    splits = {i for i in range(1, size) if token[:i] in ranks and token[i:] in ranks}
    for i in range(1, size // 2 + 1):
        order = [i, size - i] if i != size - i else [i]
        if token[:i] == token[-i:] and token[: size - i] != token[i:]:
            order.reverse()
        for split in order:
            if split in splits:
                yield token[:split], token[split:]


# --- SentencePiece -----------------------------------------------------------------------------------------------


def _sentencepiece_spec(model: SentencePieceModel, scheme: str | None) -> dict[str, Any]:
    """Normaliser, vocabulary and decoder of a SentencePiece model in the library's format.

    ``scheme``: the stretches of text between special tokens that a space is put before, as of ``Metaspace``, unless
    they begin with one; None: all, as SentencePiece does.
    """
    if model.algorithm not in (Algorithm.UNIGRAM, Algorithm.BPE):
        raise ValueError(f"a SentencePiece model of type {model.algorithm.name} cannot be written as {FILE}")
    unknown = next(id for id, piece in enumerate(model.pieces) if piece.kind is PieceKind.UNKNOWN)
    defined = [piece.text for piece in model.pieces if piece.kind is PieceKind.USER_DEFINED]
    normalizers: list[Any] = []
    if model.charsmap:
        normalizers.append({"type": "Precompiled", "precompiled_charsmap": b64encode(model.charsmap).decode()})
    if model.trims_spaces:
        normalizers.append({"type": "Replace", "pattern": {"Regex": r"\A +| +(?= )"}, "content": ""})
    adds_space = model.adds_space and scheme != "never"
    if adds_space and scheme is None:
        normalizers.append({"type": "Prepend", "prepend": SPACE})
    normalizers.append({"type": "Replace", "pattern": {"String": " "}, "content": SPACE})
    if model.trims_spaces:  # at the end of a text, also the character that stands for a space
        normalizers.append({"type": "Replace", "pattern": {"Regex": rf"{SPACE}+\z"}, "content": ""})
    steps: list[Any] = [{"type": "Replace", "pattern": {"String": SPACE}, "content": " "}]
    steps += [{"type": "ByteFallback"}] if model.has_bytes else []
    steps += [{"type": "Fuse"}]
    steps += [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if adds_space else []
    splits = _split_at(defined)
    if adds_space and scheme is not None:
        first = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": False}
        splits = _sequence("pretokenizers", [first, *([splits] if splits else [])])
    algorithm = _unigram if model.algorithm is Algorithm.UNIGRAM else _merges
    return _spec(
        splits,
        algorithm(model, unknown),
        _sequence("decoders", steps),
        _sequence("normalizers", normalizers),
    )


def _split_at(names: list[str]) -> dict[str, Any] | None:
    """The pre-tokenizer that finds user-defined symbols before anything else, the longest first."""
    if not names:
        return None
    pattern = "|".join(map(_quote, sorted(names, key=len, reverse=True)))
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _quote(name: str) -> str:
    return "".join(rf"\x{{{ord(character):x}}}" for character in name)


def _unigram(model: SentencePieceModel, unknown: int) -> dict[str, Any]:
    """A Unigram model.  Names of bytes and control symbols are plain text: their score is too low to win."""
    in_text = (PieceKind.NORMAL, PieceKind.USER_DEFINED)
    low = min(piece.score for piece in model.pieces) - 1000
    vocabulary = [[piece.text, piece.score if piece.kind in in_text else low] for piece in model.pieces]
    return {"type": "Unigram", "unk_id": unknown, "vocab": vocabulary, "byte_fallback": model.has_bytes}


def _merges(model: SentencePieceModel, unknown: int) -> dict[str, Any]:
    """A BPE model: SentencePiece joins the neighbours whose piece has the highest score, the leftmost of equals."""
    pieces = {piece.text: (piece.score, id) for id, piece in enumerate(model.pieces) if piece.kind is PieceKind.NORMAL}
    ordered = sorted(pieces, key=lambda text: (-pieces[text][0], pieces[text][1]))
    merges = [
        [text[:i], text[i:]]
        for text in ordered
        for i in range(1, len(text))
        if text[:i] in pieces and text[i:] in pieces
    ]
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": model.pieces[unknown].text,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": model.has_bytes,
        "ignore_merges": any(piece.kind is PieceKind.USER_DEFINED for piece in model.pieces),  # no merges produce those
        "vocab": {piece.text: id for id, piece in enumerate(model.pieces)},
        "merges": merges,
    }


# --- comparison of both tokenizers ---------------------------------------------------------------------------------


def _check_equal(tokenizer: Tokenizer, text: str, what: str, more: Sequence[str] = ()) -> None:
    """Raise ValueError if the exported tokenizer splits random texts differently; ``more``: fragments to include."""
    missing = "the export is checked with the tokenizers package, which is missing"
    with needing_package(f"{what}: {missing}; pip install 'llmtrain[huggingface]'"):
        import tokenizers
    try:
        written = tokenizers.Tokenizer.from_str(text)
    except Exception as error:
        raise ValueError(f"{what}: cannot be written as {FILE}: {error}") from error
    written.encode_special_tokens = True
    fragments = [part for part in [*FRAGMENTS, *more] if part not in tokenizer.special_tokens]
    for sample in _samples(fragments):
        (encoding,) = written.encode_batch_fast([sample], add_special_tokens=False)
        if not _same(tokenizer, tokenizer.encode(sample).tolist(), encoding.ids):
            raise ValueError(
                f"{what}: cannot be written as {FILE}: {sample!r} would be split differently, so other programs would "
                "give the model other tokens than in training; use the run itself: llmtrain generate, chat, predict"
            )


def _same(tokenizer: Tokenizer, ours: list[int], theirs: list[int]) -> bool:
    """True for equal ids, or for splits of equal score: a Unigram model chooses among those by rounding."""
    if ours == theirs:
        return True
    if not isinstance(tokenizer, SentencePieceTokenizer) or tokenizer.model.algorithm is not Algorithm.UNIGRAM:
        return False
    pieces = tokenizer.model.pieces
    scores = [sum(pieces[id].score for id in ids) for ids in (ours, theirs)]
    return tokenizer.decode_bytes(ours) == tokenizer.decode_bytes(theirs) and abs(scores[0] - scores[1]) < TIE


def _samples(fragments: list[str]) -> Iterator[str]:
    rng = random.Random(0)
    yield from fragments
    yield from map("".join, pairwise(fragments))
    for _ in range(SAMPLES):
        yield "".join(rng.choices(fragments, k=rng.randint(1, 30)))
