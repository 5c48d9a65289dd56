"""The special tokens that a template can use with a tokenizer."""

from collections.abc import Collection

from llmtrain.data.chat.builtin_templates import RESERVED, TEMPLATES
from llmtrain.data.chat.template import SPECIAL, ChatTemplate
from llmtrain.tokenizer import Tokenizer


def special_tokens(tokenizer: Tokenizer, names: Collection[str] = ()) -> dict[str, int]:
    """Special tokens by name, and those of ``names`` and of the built-in templates that are ordinary tokens.

    Baichuan's files declare their reserved tokens as ordinary pieces, or as tokens that are found in any text.
    """
    found = dict(tokenizer.special_tokens)
    for name, token in RESERVED.items():
        if token < tokenizer.vocab_size and tokenizer.decode_bytes([token]) == name.encode():
            found.setdefault(name, token)
    known = (name for template in TEMPLATES.values() for name in template.special_names())
    for name in {*known, *SPECIAL.findall(tokenizer.chat_template or ""), *names} - found.keys():
        ids = tokenizer.encode_continuation(name).tolist()
        if len(ids) == 1 and tokenizer.decode_bytes(ids) == name.encode():
            found[name] = ids[0]
    return found


def missing_tokens(template: ChatTemplate, tokenizer: Tokenizer) -> list[str]:
    """Special tokens of ``template`` that ``tokenizer`` lacks, so that they are spelled out as text; sorted."""
    names = template.special_names()
    return sorted(names - special_tokens(tokenizer, names).keys())
