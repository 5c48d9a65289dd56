"""Places where a text may be cut before encoding, for a tokenizer given as a ``tokenizer.json`` or as pieces.

A place counts only if the parts are known to have the ids of the whole.  Without such places documents are encoded
whole, which costs only memory.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from llmtrain.tokenizer import CUTS, WORD_ENDS
from llmtrain.tokenizer.bpe import PATTERNS, for_oniguruma
from llmtrain.tokenizer.token_bytes import BYTE, SPACE, flatten

# Patterns of model families; each ends a match at the end of a word, and none looks back.
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_2 = LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")
GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SAFE_PATTERNS = {*map(for_oniguruma, PATTERNS.values()), *PATTERNS.values(), LLAMA_3, QWEN_2, GPT_2}

# Normalizers that look at one character at a time, or at one with the marks that follow it.
SAFE_NORMALIZERS = {"NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "BertNormalizer", "Prepend"}


def cuts_of(spec: Mapping[str, Any]) -> Sequence[re.Pattern[str]]:
    """The safe ones among ``CUTS``; ``spec``: the file as JSON."""
    plain = [token for token in spec["added_tokens"] if not token["special"]]
    if any(map(_looks_around, plain)) or (plain and adds_space_first(spec)):
        return ()
    if not all(map(_is_safe_normalizer, flatten(spec.get("normalizer"), "normalizers"))):
        return ()
    return min(_cuts_of_words(spec), cuts_of_pieces(token["content"] for token in plain), key=len)


def _cuts_of_words(spec: Mapping[str, Any]) -> Sequence[re.Pattern[str]]:
    steps = flatten(spec.get("pre_tokenizer"), "pretokenizers")
    while steps and steps[0]["type"] == "Digits":  # looks at one character at a time
        steps = steps[1:]
    if steps and _ends_words(steps[0]):
        return CUTS
    model = spec["model"]
    is_joined = not steps or (steps[0]["type"] == "Metaspace" and len(steps) == 1)
    is_affixed = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
    if not is_joined or is_affixed or not model.get("byte_fallback"):  # else a run of unknown characters is one token
        return ()
    if model["type"] == "Unigram":
        return cuts_of_pieces(piece for piece, _ in model["vocab"])
    return cuts_of_pieces(model["vocab"])


def cuts_of_pieces(pieces: Iterable[str]) -> Sequence[re.Pattern[str]]:
    """The ones among ``CUTS`` that no piece of a SentencePiece vocabulary spans."""
    texts = [piece.replace(SPACE, " ") for piece in pieces if not BYTE.fullmatch(piece)]
    for number, end in enumerate(map(re.compile, WORD_ENDS)):
        if any(map(end.search, texts)):
            return CUTS[:number]
    return CUTS


def adds_space_first(spec: Mapping[str, Any]) -> bool:
    """True if the tokenizer puts a space before a text, as SentencePiece does."""
    normalizers = flatten(spec.get("normalizer"), "normalizers")
    steps = flatten(spec.get("pre_tokenizer"), "pretokenizers")
    return (
        any(step["type"] == "Prepend" for step in normalizers)
        or any(step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never" for step in steps)
        or any(step["type"] == "ByteLevel" and step["add_prefix_space"] for step in steps)
    )


def _looks_around(token: Mapping[str, Any]) -> bool:
    return token["single_word"] or (token["rstrip"] and token["content"][-1:].isalnum())


def _is_safe_normalizer(step: Mapping[str, Any]) -> bool:
    if step["type"] == "Replace":
        return len(step["pattern"].get("String", "")) == 1
    return step["type"] in SAFE_NORMALIZERS


def _ends_words(step: Mapping[str, Any]) -> bool:
    match step["type"]:
        case "ByteLevel":
            return step.get("use_regex", True) and not step["add_prefix_space"]
        case "Split":
            known = step["pattern"].get("Regex") in SAFE_PATTERNS
            return known and (step["behavior"], step["invert"]) in [("Isolated", False), ("Removed", True)]
        case kind:
            return kind in ("BertPreTokenizer", "Whitespace")
