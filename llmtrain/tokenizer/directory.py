"""A tokenizer's directory in Hugging Face's format: its special tokens by role, and its chat template."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONFIG = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"
MAP, ADDED = "special_tokens_map.json", "added_tokens.json"
MODEL_CONFIG, GENERATION = "config.json", "generation_config.json"
FILES = (CONFIG, MAP, ADDED, MODEL_CONFIG, GENERATION, TEMPLATE)  # all that are read beside a tokenizer's own file

ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
DEFAULT_NAMES = {  # of the classes of transformers, where no file names another
    "LlamaTokenizer": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "GPT2Tokenizer": dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"),
    "Qwen2Tokenizer": dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>"),
}


def beside(file: Path) -> dict[str, bytes]:
    """The files in the directory of a tokenizer's ``file`` that belong to it, by name: all that is read of them."""
    return {name: read_bytes(file.with_name(name)) for name in FILES if file.with_name(name).is_file()}


@dataclass(frozen=True)
class TokenizerDirectory:
    """The JSON files of a directory; {} for a missing one."""

    folder: Path
    tokenizer_config: dict[str, Any]
    special_tokens_map: dict[str, Any]
    added_tokens: dict[str, Any]
    model_config: dict[str, Any]
    generation_config: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> "TokenizerDirectory":
        """Read the files.  Raises ValueError, naming the file, for one that is not a JSON object."""
        return cls(folder, *(_read_object(folder / name) for name in (CONFIG, MAP, ADDED, MODEL_CONFIG, GENERATION)))

    @property
    def others(self) -> tuple[dict[str, Any], ...]:
        return self.special_tokens_map, self.model_config, self.generation_config

    @property
    def class_name(self) -> str:
        """The class of transformers that the tokenizer names, without ``Fast``; "" if it names none."""
        found = self.tokenizer_config.get("tokenizer_class") or self.model_config.get("tokenizer_class") or ""
        return str(found).removesuffix("Fast")

    def names_of_roles(self) -> dict[str, str]:
        """The tokens that have a role, such as ``bos_token``, by name: those that transformers gives to a template."""
        named = {**DEFAULT_NAMES.get(self.class_name, {}), **self.tokenizer_config}
        if "added_tokens_decoder" not in self.tokenizer_config:
            named |= self.special_tokens_map
        found = {role: name_of(named.get(role)) for role in ROLES}
        return {role: name for role, name in found.items() if name is not None}

    def token(self, role: str) -> str | int | None:
        """The token of ``role`` (``eos``, ``bos``), by name or by id; None if no file names it.

        A null for ``bos`` in tokenizer_config.json is final: the model's configuration may still name one, but the
        tokenizer does not put it before a text.
        """
        if role == "bos" and self.tokenizer_config.get("bos_token", "") is None:
            return None
        for config in (self.tokenizer_config, *self.others):
            found = config.get(f"{role}_token", config.get(f"{role}_token_id"))
            if isinstance(found, list):  # several ids can end a text
                found = found[0] if found else None
            found = name_of(found) if isinstance(found, dict) else found
            if isinstance(found, str | int):
                return found
        return None

    def chat_template(self) -> str | None:
        """The Jinja source of the default template.  A file of its own takes precedence, as in transformers."""
        path = self.folder / TEMPLATE
        if path.is_file():
            return read_file(path)
        found = self.tokenizer_config.get("chat_template")
        if isinstance(found, list):  # several, by name
            found = next((each.get("template") for each in found if each.get("name") == "default"), None)
        return found if isinstance(found, str) else None


def name_of(token: Any) -> str | None:
    """The name of a token that a file gives as text, or as an object with flags."""
    found = token.get("content") if isinstance(token, dict) else token
    return found if isinstance(found, str) else None


def locate_file(path: str, name: str, remedy: str) -> Path:
    """The file ``path``, or ``name`` in the directory ``path``.  Raises ValueError if it is missing."""
    found = Path(path).expanduser()
    if found.is_dir():
        if not (found / name).is_file():
            raise ValueError(f"tokenizer.path={path}: there is no {name} in it; {remedy}")
        return found / name
    if not found.is_file():
        raise ValueError(f"tokenizer.path={path}: no such file; give a {name} or a directory that holds one")
    return found


def read_bytes(path: Path) -> bytes:
    """Read a file.  Raises ValueError, naming it, if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error


def read_file(path: Path) -> str:
    """Read a text file.  Raises ValueError, naming it, if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start} is not UTF-8 ({error.reason})") from error


def parse_object(text: str, path: Path) -> dict[str, Any]:
    """Parse ``text``, the content of ``path``, as a JSON object.  Raises ValueError if it is not one."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cut or damaged, not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: not a JSON object")
    return found


def _read_object(path: Path) -> dict[str, Any]:
    return parse_object(read_file(path), path) if path.is_file() else {}
