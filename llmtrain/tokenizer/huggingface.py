"""A ``tokenizer.json``, as in models on the Hugging Face hub, through the tokenizers library alone.

No code that comes with a model is run, nothing is downloaded, and transformers is not needed.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from llmtrain.base.checks import needing_package
from llmtrain.tokenizer import UNUSED, Tokenizer
from llmtrain.tokenizer.as_transformers import (
    add_tokens,
    added_token,
    as_transformers,
    ids_around,
    post_processor,
)
from llmtrain.tokenizer.directory import TokenizerDirectory, parse_object, read_file
from llmtrain.tokenizer.hidden_names import HiddenNames, hidden_name
from llmtrain.tokenizer.in_directory import TokenizerInDirectory
from llmtrain.tokenizer.marked_text import MarkedEncoder
from llmtrain.tokenizer.safe_cuts import adds_space_first, cuts_of
from llmtrain.tokenizer.token_bytes import TokenDecoder, flatten

if TYPE_CHECKING:
    import tokenizers

FILE = "tokenizer.json"
STRETCH = 1 << 17  # characters given to the library at once: it takes about 400 bytes of memory a token

# Characters of every class, to check that decoding gives the text back.
SAMPLE = "It's 12,345 o'clock — été,\tÑandú,\r\n\n  你好。 🙂\u00a0_x_ \x07 !  x"


@dataclass(frozen=True)
class HuggingFace(TokenizerInDirectory):
    """The path of a ``tokenizer.json``, or of a directory that holds one."""

    file_name: ClassVar[str] = FILE
    if_missing: ClassVar[str] = (
        "transformers writes one: AutoTokenizer.from_pretrained(…).save_pretrained(…); a tokenizer.model is for "
        "tokenizer=sentencepiece"
    )

    def build(self) -> "HuggingFaceTokenizer":
        file = self.locate()
        missing = "the tokenizers package is not installed; pip install 'llmtrain[huggingface]'"
        with needing_package(f"tokenizer=huggingface: {missing}"):
            import tokenizers  # noqa: F401
        directory = TokenizerDirectory.read(file.parent)
        return HuggingFaceTokenizer(file, read_file(file), directory, self.end_of_text, self.version)


class HuggingFaceTokenizer(Tokenizer):
    """Two tokenizers of the library: one that treats special tokens as ordinary characters, and one as in the files.

    Added tokens that the files do not mark as special, such as runs of spaces or ``<think>``, are text, as in
    transformers.  ``version``: see ``conf/tokenizer/huggingface.yaml``.
    """

    def __init__(
        self, file: Path, source: str, directory: TokenizerDirectory, end_of_text: str | None = None, version: int = 2
    ) -> None:
        self.file, self.source, self.directory = file, source, directory
        self._spec = _clean(parse_object(source, file), file)
        if version > 1:
            self._spec = as_transformers(self._spec, directory)
        self._marked = self._load(self._spec)
        self._around = ids_around(self._marked)
        if version > 1:
            add_tokens(self._marked, self._spec["added_tokens"], directory)
            self.prefix, _ = self._around
            self.bos = self.prefix[0] if self.prefix else None
        else:
            self.bos = self._find(directory.token("bos"))
        self.end_of_text = self._find_end(end_of_text)
        self._mark_special(*self.prefix, self.bos, self.end_of_text)
        if version > 1:
            self._spec["added_tokens"] = json.loads(self._marked.to_str())["added_tokens"]
            end = str(self._marked.id_to_token(self.end_of_text))
            self.named_tokens = directory.names_of_roles() | {"eos_token": end}
        added = self._marked.get_added_tokens_decoder()
        self.special_tokens = {token.content: id for id, token in sorted(added.items()) if token.special}
        self.vocab_size = max(self._marked.get_vocab(with_added_tokens=True).values()) + 1
        self.chat_template = directory.chat_template()
        self.fingerprint = _fingerprint(self._spec, self.special_tokens, self.end_of_text, self.prefix)
        hidden = _hide(self._spec, self.special_tokens)
        self.cuts = cuts_of(hidden)
        self._plain = self._continuing = self._load(hidden)
        if adds_space_first(hidden):
            self._continuing = self._load(_without_space_first(hidden))

    @property
    def text_size(self) -> int:
        added = self._marked.get_added_tokens_decoder()
        return (
            max((id for id in self._marked.get_vocab(with_added_tokens=True).values() if id not in added), default=0)
            + 1
        )

    def encode(self, text: str) -> np.ndarray:
        return self._encode(self._plain, text)

    def encode_continuation(self, text: str) -> np.ndarray:
        return self._encode(self._continuing, text)

    def marked_encoder(self, marks: Mapping[str, int]) -> MarkedEncoder:
        every = {**self.special_tokens, **marks}
        added = self._with_marks(every)
        if every.keys() == self.special_tokens.keys() and added == self._spec["added_tokens"]:
            return HiddenNames(self._plain, every)
        return HiddenNames(self._load(_hide({**self._spec, "added_tokens": added}, every)), every)

    def _with_marks(self, marks: Mapping[str, int]) -> list[dict[str, Any]]:
        """The added tokens, with those of ``marks`` that are none yet."""
        there = {token["content"] for token in self._spec["added_tokens"]}
        return self._spec["added_tokens"] + [added_token(name, marks[name]) for name in marks if name not in there]

    def to_json(self, marks: Mapping[str, int]) -> str:
        """The ``tokenizer.json`` of what is computed here, with ``marks`` as special tokens; the file's own if it is.

        It puts ``prefix`` before a text, and nothing behind it.
        """
        original = _clean(parse_object(self.source, self.file), self.file)
        spec = {**self._spec, "added_tokens": self._with_marks(marks)}
        if self._around != (self.prefix, ()):
            names = {id: name for name, id in self.special_tokens.items()}
            spec["post_processor"] = post_processor([(names[id], id) for id in self.prefix])
        by_id = sorted(spec["added_tokens"], key=lambda token: token["id"])
        if by_id == sorted(original["added_tokens"], key=lambda token: token["id"]) and all(
            spec.get(key) == original.get(key) for key in spec if key != "added_tokens"
        ):
            return self.source
        return json.dumps(spec, ensure_ascii=False, indent=2) + "\n"

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        return b"".join(self._bytes.get(id, UNUSED) for id in ids)

    def _encode(self, first: "tokenizers.Tokenizer", text: str) -> np.ndarray:
        if len(text) <= STRETCH:
            return _ids(first, text)
        parts = _stretches(text, self.cuts)
        return np.concatenate([_ids(first, next(parts)), *(_ids(self._continuing, part) for part in parts)])

    @cached_property
    def _bytes(self) -> dict[int, bytes]:
        try:
            decoder = TokenDecoder(self._spec.get("decoder"))
        except ValueError as error:
            raise ValueError(f"{self.file}: {error}") from error
        vocabulary = self._marked.get_vocab(with_added_tokens=True)
        table = {id: decoder(token) for token, id in vocabulary.items()}
        table.update((id, name.encode()) for name, id in self.special_tokens.items())
        ids = [id for id in self.encode(SAMPLE).tolist() if id not in self.special_tokens.values()]
        ours = b"".join(table[id] for id in ids).decode(errors="replace")
        if ours.strip(" ") != self._marked.decode(ids, skip_special_tokens=False).strip(" "):
            raise ValueError(
                f"{self.file}: its decoder needs several tokens at once, but text is shown while it is generated"
            )
        return table

    def _load(self, spec: Mapping[str, Any]) -> "tokenizers.Tokenizer":
        import tokenizers

        try:
            return tokenizers.Tokenizer.from_str(json.dumps(spec))
        except BaseException as error:  # the library may raise something other than an Exception
            if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
                raise
            raise ValueError(
                f"{self.file}: not a {FILE} that tokenizers {tokenizers.__version__} can read: {error}"
            ) from error

    def _find(self, token: str | int | None) -> int | None:
        """The id of a token given by name or by id; None for a missing one."""
        if isinstance(token, str):
            return self._marked.token_to_id(token)
        return token if token is not None and self._marked.id_to_token(token) is not None else None

    def _find_end(self, name: str | None) -> int:
        token = self.directory.token("eos") if name is None else name
        found = self._find(token)
        if found is not None:
            return found
        special = [token.content for token in self._marked.get_added_tokens_decoder().values() if token.special]
        there = ", ".join(sorted(special)) or "none"
        if token is None:
            raise ValueError(
                f"tokenizer.end_of_text=null: no file in {self.file.parent} names an eos_token; name the token that "
                f"ends a document; special tokens of {self.file.name}: {there}"
            )
        said = "" if name is not None else f", which a file in {self.file.parent} names as eos_token"
        raise ValueError(f"tokenizer.end_of_text={token}{said}: not a token of {self.file}; special tokens: {there}")

    def _mark_special(self, *ids: int | None) -> None:
        """Mark the tokens that files beside the tokenizer name as special."""
        from tokenizers import AddedToken

        known = {token.content for token in self._marked.get_added_tokens_decoder().values() if token.special}
        for id in ids:
            name = None if id is None else self._marked.id_to_token(id)
            if name is not None and name not in known:
                self._marked.add_special_tokens([AddedToken(name, special=True, normalized=False)])


def _ids(tokenizer: "tokenizers.Tokenizer", text: str) -> np.ndarray:
    # Not `encode`, which holds Python's lock and also counts characters.
    (encoding,) = tokenizer.encode_batch_fast([text], add_special_tokens=False)
    return np.array(encoding.ids, np.uint32)


def _stretches(text: str, cuts: Sequence[re.Pattern[str]]) -> Iterator[str]:
    """Yield ``text`` in parts of about ``STRETCH`` characters, as far as it can be cut."""
    start = 0
    while len(text) - start > STRETCH:
        window = text[start : start + STRETCH]
        matches = (pattern.match(window) for pattern in cuts)
        cut = next((match.end() for match in matches if match), 0)
        if not cut:
            break
        yield window[:cut]
        start += cut
    yield text[start:]


def _clean(spec: dict[str, Any], file: Path) -> dict[str, Any]:
    """``spec`` without settings that vary ids or cut a text: dropout, truncation, padding."""
    if not isinstance(spec.get("model"), dict) or "vocab" not in spec["model"]:
        raise ValueError(f"{file}: not a {FILE}: it has no model with a vocabulary")
    model = dict(spec["model"])
    if "type" not in model:  # files of early versions
        model["type"] = "Unigram" if isinstance(model["vocab"], list) else "BPE" if "merges" in model else "WordPiece"
    if "dropout" in model:
        model["dropout"] = None
    return {**spec, "model": model, "added_tokens": spec.get("added_tokens") or [], "truncation": None, "padding": None}


def _hide(spec: dict[str, Any], special_tokens: Mapping[str, int]) -> dict[str, Any]:
    """The same tokenizer with names for its special tokens that no text contains (:func:`hidden_name`).

    The library can be told to ignore special tokens, but a vocabulary that holds their names (Unigram's does) still
    gives their ids.
    """
    model = spec["model"]
    merged = {"".join(_pair(merge)) for merge in model.get("merges", ())}  # a token made by a merge has to stay
    names = {name: hidden_name(id) for name, id in special_tokens.items() if name not in merged}
    if isinstance(model["vocab"], list):
        vocabulary: Any = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
    else:
        vocabulary = {names.get(piece, piece): id for piece, id in model["vocab"].items()}
    hidden = {**model, "vocab": vocabulary}
    if model.get("unk_token"):
        hidden["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    added = [{**token, "content": names.get(token["content"], token["content"])} for token in spec["added_tokens"]]
    return {**spec, "model": hidden, "added_tokens": added, "post_processor": None, "decoder": None}


def _without_space_first(spec: dict[str, Any]) -> dict[str, Any]:
    normalizers = [step for step in flatten(spec.get("normalizer"), "normalizers") if step["type"] != "Prepend"]
    steps = [dict(step) for step in flatten(spec.get("pre_tokenizer"), "pretokenizers")]
    for step in steps:
        if step["type"] == "Metaspace":
            step["prepend_scheme"] = "never"
            step.pop("add_prefix_space", None)
        elif step["type"] == "ByteLevel":
            step["add_prefix_space"] = False
    return {
        **spec,
        "normalizer": {"type": "Sequence", "normalizers": normalizers} if normalizers else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps} if steps else None,
    }


def _pair(merge: str | list[str]) -> list[str]:
    """The two parts of a merge, which earlier versions wrote as one string."""
    return merge.split(" ") if isinstance(merge, str) else merge


def _fingerprint(
    spec: dict[str, Any], special_tokens: Mapping[str, int], end_of_text: int, prefix: Sequence[int]
) -> str:
    """sha256 over everything that decides the ids of a text."""
    model = dict(spec["model"])
    if "merges" in model:
        model["merges"] = [_pair(merge) for merge in model["merges"]]
    parts = [
        model, spec.get("normalizer"), spec.get("pre_tokenizer"), spec["added_tokens"], special_tokens, end_of_text,
    ]  # fmt: skip
    if prefix:
        parts.append(list(prefix))
    return f"huggingface-{hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()}"
