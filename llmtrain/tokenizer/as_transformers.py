"""The files of a tokenizer as transformers 5 reads them: the class that they name, and tokens that stand beside.

Source: ``tokenization_utils_tokenizers.py``, ``tokenization_utils_base.py`` (``_from_pretrained``) and
``models/llama/tokenization_llama.py`` of transformers 5.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llmtrain.tokenizer.directory import ROLES, TokenizerDirectory, name_of
from llmtrain.tokenizer.token_bytes import SPACE, flatten

if TYPE_CHECKING:
    import tokenizers

VERSIONS = (1, 2)
LLAMA = "LlamaTokenizer"

# Models whose tokenizers transformers takes as they are in tokenizer.json, although their files name another class.
AS_IN_THE_FILE = ("mistral", "mistral3", "ministral", "ministral3", "mixtral", "pixtral", "voxtral", "phi3", "qwen2")


def check_version(version: int) -> None:
    """Raise ValueError for an unknown reading of a tokenizer's files."""
    if version not in VERSIONS:
        raise ValueError(f"version={version}: there are {' and '.join(map(str, VERSIONS))}")


def as_transformers(spec: dict[str, Any], directory: TokenizerDirectory) -> dict[str, Any]:
    """``spec``, a ``tokenizer.json``, as the class that the files name reads it.

    ``LlamaTokenizer`` takes vocabulary and merges alone, and puts a space before a text by its key ``legacy``: before
    every stretch between special tokens if it is true, else before the first.
    """
    model = spec["model"]
    steps = [*flatten(spec.get("pre_tokenizer"), "pretokenizers"), *flatten(spec.get("decoder"), "decoders")]
    if (
        directory.class_name != LLAMA
        or directory.model_config.get("model_type") in AS_IN_THE_FILE
        or model["type"] != "BPE"
        or any(step["type"] == "ByteLevel" for step in steps)
    ):
        return dict(spec)
    scheme = prepend_scheme(directory)
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
    ]  # fmt: skip
    if scheme != "never":
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    plain = {
        "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": True,
        "byte_fallback": True, "ignore_merges": False,
    }  # fmt: skip
    return {
        **spec,
        "model": {**model, **plain},
        "normalizer": None,
        "pre_tokenizer": {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": False},
        "decoder": {"type": "Sequence", "decoders": decoders},
    }


def prepend_scheme(directory: TokenizerDirectory) -> str:
    """The stretches of a text that ``LlamaTokenizer`` puts a space before: ``always``, ``first`` or ``never``."""
    config = directory.tokenizer_config
    if config.get("add_prefix_space") is False:
        return "never"
    return "always" if config.get("legacy") else "first"


def add_tokens(
    tokenizer: "tokenizers.Tokenizer", added: Sequence[Mapping[str, Any]], directory: TokenizerDirectory
) -> None:
    """Add to ``tokenizer`` the tokens that stand in files beside it alone; ``added``: those of ``tokenizer.json``."""
    from tokenizers import AddedToken

    config = directory.tokenizer_config
    roles = directory.names_of_roles()
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    beside: dict[int, Any] = {}
    if "added_tokens_decoder" in config:
        beside = {int(id): _token(token) for id, token in config["added_tokens_decoder"].items()}
    else:
        others = directory.special_tokens_map
        more = others.get("extra_special_tokens") or others.get("additional_special_tokens") or []
        extra = _as_list(extra) + _as_list(more)
        special = {*roles.values(), *map(name_of, extra)}
        for name, id in directory.added_tokens.items():
            is_special = name in special
            beside[id] = AddedToken(name, special=is_special, normalized=not is_special)
        beside |= {token["id"]: _token(token) for token in added}
    tokens = [token for _, token in sorted(beside.items(), key=lambda item: item[0])]
    known = {token.content for token in (*tokens, *tokenizer.get_added_tokens_decoder().values())}
    values = {**config, **({} if "added_tokens_decoder" in config else directory.special_tokens_map)}
    for token in (*(values.get(role, roles.get(role)) for role in ROLES if role in roles), *_as_list(extra)):
        given = name_of(token)
        if given is None or given in known:
            continue
        known.add(given)
        tokens.append(_token(token, special=True) if isinstance(token, dict) else AddedToken(given, special=True))
    for token in tokens:
        if token.content in roles.values():
            token.special = True
    tokenizer.add_tokens(tokens)


def _as_list(tokens: Any) -> list[Any]:
    return list(tokens.values()) if isinstance(tokens, dict) else list(tokens)


def _token(token: Mapping[str, Any], **more: Any) -> Any:
    from tokenizers import AddedToken

    flags = ("lstrip", "rstrip", "single_word", "normalized", "special")
    return AddedToken(token["content"], **{key: token[key] for key in flags if key in token} | more)


def ids_around(tokenizer: "tokenizers.Tokenizer") -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids that the tokenizer puts before a text and behind it."""
    bare = tokenizer.encode("a", add_special_tokens=False).ids
    whole = tokenizer.encode("a", add_special_tokens=True).ids
    start = next((i for i in range(len(whole) - len(bare) + 1) if whole[i : i + len(bare)] == bare), 0)
    return tuple(whole[:start]), tuple(whole[start + len(bare) :])


def added_token(name: str, id: int) -> dict[str, Any]:
    """The entry of a special token in ``tokenizer.json``."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": id, "content": name, **flags, "special": True}


def post_processor(before: Sequence[tuple[str, int]], behind: Sequence[tuple[str, int]] = ()) -> dict[str, Any] | None:
    """The part of a ``tokenizer.json`` that puts tokens, by name and id, before and behind a text; None: no tokens."""
    if not before and not behind:
        return None

    def around(text: str, type_id: int) -> list[dict[str, Any]]:
        special = [
            [{"SpecialToken": {"id": name, "type_id": type_id}} for name, _ in each] for each in (before, behind)
        ]
        return [*special[0], {"Sequence": {"id": text, "type_id": type_id}}, *special[1]]

    return {
        "type": "TemplateProcessing",
        "single": around("A", 0),
        "pair": around("A", 0) + around("B", 1),
        "special_tokens": {name: {"id": name, "ids": [id], "tokens": [name]} for name, id in (*before, *behind)},
    }
