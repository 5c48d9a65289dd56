"""Checkpoints in Hugging Face's form: a file for each family of models, with its names and its ``config.json``.

No code that comes with a checkpoint is run, and nothing is unpickled: a directory is read as JSON and safetensors.
"""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from llmtrain.hf.config_json import ConfigJson
from llmtrain.model import LanguageModel, ModelConfig

HEAD = "lm_head.weight"
SCORE = "score.weight"  # of a classifier
CLASSIFIER = "classifier.weight"  # ours


@dataclass(frozen=True)
class Map:
    """Tensors of ours and of theirs that hold the same numbers, whichever way they are carried.

    The rows of ours, one tensor after another, are the rows of theirs, one after another: so a map says that one has
    another name there, that ours is made of several of theirs, or that theirs is made of several of ours.
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    rows: tuple[int, ...] = ()  # of each of theirs, where there are several
    transposed: bool = False  # theirs is (inputs, outputs)
    may_be_longer: bool = False  # theirs may have more rows than we take: positions that are not used
    zeros: tuple[int, ...] = ()  # shape of theirs where ours is empty: a bias that we do not have, and that must be 0


class Family(ABC):
    """What is particular to the models of a few ``model_type``s."""

    model_types: ClassVar[tuple[str, ...]]
    prefix: ClassVar[str]  # of all names but the head's; checkpoints of a bare model, without a head, lack it
    embedding: ClassVar[str]  # name of the token embedding, which a tied head shares
    dropped: ClassVar[str]  # regular expression of tensors that follow from the configuration: not parameters

    @abstractmethod
    def read_config(self, config: ConfigJson) -> ModelConfig:
        """The model that ``config.json`` describes, without dropout.

        Every key that changes what is computed is read.  Raises ValueError, naming key and value, for what is computed
        otherwise than here.
        """

    @abstractmethod
    def write_config(self, config: ModelConfig, vocab_size: int) -> dict[str, Any]:
        """``config.json`` of a model, ``model_type`` and ``architectures`` included.

        Raises ValueError, naming the key of ours, for what their implementation cannot compute.
        """

    @abstractmethod
    def names(self, config: ModelConfig, model_type: str) -> list[Map]:
        """Every tensor of a model of ``config``, and every one of a checkpoint of ``model_type``."""

    def module_names(self, model: LanguageModel) -> dict[str, str]:
        """Their name of each of our modules that has a weight and is one module there too."""
        config = config_of(model)
        maps = self.names(config, self.write_config(config, model.vocab_size)["model_type"])
        whole = [(m.ours[0], m.theirs[0]) for m in maps if len(m.ours) == len(m.theirs) == 1]
        return {
            ours.removesuffix(".weight"): theirs.removesuffix(".weight")
            for ours, theirs in whole
            if ours.endswith(".weight")
        }


FAMILIES = {  # model_type: module and class
    "gpt2": "llmtrain.hf.gpt2.GPT2",
    "llama": "llmtrain.hf.llama.LlamaFamily",
    "mistral": "llmtrain.hf.llama.LlamaFamily",
    "qwen2": "llmtrain.hf.llama.LlamaFamily",
    "qwen3": "llmtrain.hf.llama.LlamaFamily",
    "baichuan": "llmtrain.hf.baichuan.Baichuan",
}


def family_of(config: ConfigJson) -> Family:
    """The family of a checkpoint.  Raises ValueError for a ``model_type`` that is not known here."""
    model_type = config.text("model_type")
    if model_type not in FAMILIES:
        config.refuse("model_type", f"not a family that is known here; there are: {', '.join(FAMILIES)}")
    return _family(model_type)


def family_for(config: ModelConfig) -> Family:
    """The family that a model of ours is written as.  Raises ValueError if there is none."""
    from llmtrain.model.gpt import GPTConfig
    from llmtrain.model.llama import LlamaConfig, Position

    if isinstance(config, GPTConfig):
        return _family("gpt2")
    if isinstance(config, LlamaConfig):
        return _family("baichuan" if config.normalised_head or config.position is Position.alibi else "llama")
    raise ValueError(f"model._target_={type(config).__name__}: no family of Hugging Face's is known that computes it")


def config_of(model: LanguageModel) -> ModelConfig:
    """The configuration that ``model`` was built of."""
    config: Any = model.config
    if not isinstance(config, ModelConfig):
        raise ValueError(f"model: a {type(model).__name__}, which is none of Hugging Face's families")
    return config


def with_classifier(maps: list[Map]) -> list[Map]:
    """The maps of a ``…ForSequenceClassification``: a linear layer for classes in place of that for tokens."""
    return [*(each for each in maps if each.theirs != (HEAD,)), Map((CLASSIFIER,), (SCORE,))]


def module_names(model: LanguageModel) -> dict[str, str]:
    """As :meth:`Family.module_names`, of whatever family ``model`` is."""
    return family_for(config_of(model)).module_names(model)


def changes(config: ModelConfig, other: ModelConfig, keys: Sequence[str]) -> list[str]:
    """Those of ``keys`` in which two configurations of one class differ."""
    return [key for key in keys if getattr(config, key) != getattr(other, key)]


def _family(model_type: str) -> Family:
    module, _, name = FAMILIES[model_type].rpartition(".")
    family: Family = getattr(importlib.import_module(module), name)()
    return family
