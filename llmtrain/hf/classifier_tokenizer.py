"""Tokenizer export for classifiers: adds the special tokens and the padding used in training."""

import json
from collections.abc import Mapping

from llmtrain.hf.tokenizer_export import FILE
from llmtrain.tokenizer import Tokenizer
from llmtrain.tokenizer.as_transformers import added_token, post_processor
from llmtrain.tokenizer.directory import CONFIG

PAD = "<|pad|>"


def find_padding(tokenizer: Tokenizer, files: Mapping[str, str]) -> tuple[str, int] | None:
    """Name and id of the token that pads a batch; None if there is none, or if texts contain it."""
    named = json.loads(files[CONFIG]).get("pad_token")
    name = named.get("content") if isinstance(named, dict) else named
    id = tokenizer.special_tokens.get(str(name))
    return None if id is None or id in (*tokenizer.begin, tokenizer.end_of_text) else (str(name), id)


def next_id(files: Mapping[str, str]) -> int:
    """The first id behind all of the tokenizer's, those among them that the model has no row for."""
    spec = json.loads(files[FILE])
    vocabulary = spec["model"]["vocab"]
    ids = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
    return 1 + max(*ids, *(token["id"] for token in spec["added_tokens"]))


def add_classifier_tokens(
    files: Mapping[str, str], tokenizer: Tokenizer, *, ends: bool, pad: tuple[str, int] | None
) -> dict[str, str]:
    """Change ``files`` of :mod:`llmtrain.hf.tokenizer_export` so that the tokenizer adds tokens when it is called.

    The token that begins a text, if there is one, comes before it, with ``ends`` the one that ends a text after it.
    ``pad``: name and id of the token that pads a batch on the right, added if the tokenizer lacks it.
    """
    spec, config = json.loads(files[FILE]), json.loads(files[CONFIG])
    names = {id: name for name, id in tokenizer.special_tokens.items()}
    behind = [tokenizer.end_of_text] if ends else []
    spec["post_processor"] = post_processor(*([(names[id], id) for id in ids] for ids in (tokenizer.begin, behind)))
    config.pop("pad_token", None)
    if pad is not None:
        name, id = pad
        if all(token["content"] != name for token in spec["added_tokens"]):
            spec["added_tokens"].append(added_token(name, id))
        config |= {"pad_token": name, "padding_side": "right"}
    dumped = {FILE: spec, CONFIG: config}
    return {**files, **{name: json.dumps(each, ensure_ascii=False, indent=2) + "\n" for name, each in dumped.items()}}
