"""The files of the model that a run started from: what an export keeps of them, and what it says that it changes."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtrain.base.format import setting
from llmtrain.hf.config_json import NAME
from llmtrain.model import ModelConfig
from llmtrain.model.llama import LlamaConfig, Position

GENERATION = "generation_config.json"
TOKENIZER = "tokenizer_config.json"
WRITTEN_ANEW = ("transformers_version", "_from_model_config", "_commit_hash")


@dataclass(frozen=True)
class BaseFiles:
    """The JSON files of a directory of transformers; {} for a missing one."""

    config: Mapping[str, Any]
    generation: Mapping[str, Any]
    tokenizer: Mapping[str, Any]

    @classmethod
    def read(cls, folder: Path | None) -> "BaseFiles":
        return cls(*(_read(folder, name) for name in (NAME, GENERATION, TOKENIZER)))

    def tokens(self, ours: Mapping[str, int | None]) -> dict[str, Any]:
        """The ids of special tokens in config.json: the base's, but for one that training uses otherwise."""
        found: dict[str, Any] = dict(ours)
        for key, id in ours.items():
            base = self.config.get(key)
            if base is not None and (id is None or id in _as_list(base)):
                found[key] = base
        return found

    def generation_config(self, tokens: Mapping[str, Any], ends: list[int]) -> dict[str, Any]:
        """generation_config.json: the base's settings, with every token that ends a text or a response."""
        kept = {key: value for key, value in self.generation.items() if key not in WRITTEN_ANEW}
        before = _as_list(kept.get("eos_token_id"))
        every = [*before, *(id for id in ends if id not in before)]
        rest = {key: id for key, id in tokens.items() if id is not None and key not in kept}
        return {**rest, **kept, "eos_token_id": every[0] if len(every) == 1 else every}

    def positions(self, config: ModelConfig, values: Mapping[str, Any]) -> dict[str, Any]:
        """``max_position_embeddings`` of the base, where no weight depends on it; {} elsewhere."""
        key = "max_position_embeddings"
        base, ours = self.config.get(key), values.get(key)
        is_free = isinstance(config, LlamaConfig) and config.position is Position.rope
        return {key: base} if is_free and isinstance(base, int) and isinstance(ours, int) and base > ours else {}

    def changes(self, config: Mapping[str, Any], generation: Mapping[str, Any]) -> Iterator[str]:
        """Yield the settings of the base that differ in the files written, in words."""
        for name, before, after in ((NAME, self.config, config), (GENERATION, self.generation, generation)):
            for key, value in before.items():
                if key in after and after[key] != value and key in TOLD:
                    yield f"{name}: {key}={setting(after[key])}, in the base {setting(value)}"


TOLD = (
    "model_type", "vocab_size", "max_position_embeddings", "n_positions", "tie_word_embeddings", "attention_bias",
    "bos_token_id", "eos_token_id", "pad_token_id", "architectures",
)  # fmt: skip


def _as_list(value: Any) -> list[int]:
    return [] if value is None else list(value) if isinstance(value, list) else [value]


def _read(folder: Path | None, name: str) -> dict[str, Any]:
    path = None if folder is None else folder / name
    if path is None or not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: cut or damaged, not JSON: {error}") from error
    return found if isinstance(found, dict) else {}
