"""Checkpoints in Hugging Face's format: the contract of a family of models, each a module of this folder.

No code that comes with a checkpoint is run, and nothing is unpickled: only JSON and safetensors files are read.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from llmtrain.hf.config_json import ConfigJson
from llmtrain.model import LanguageModel, ModelConfig

HEAD = "lm_head.weight"
SCORE = "score.weight"  # of a classifier
CLASSIFIER = "classifier.weight"  # ours


@dataclass(frozen=True)
class TensorMap:
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


class ModelFamily(ABC):
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
    def names(self, config: ModelConfig, model_type: str) -> list[TensorMap]:
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


def config_of(model: LanguageModel) -> ModelConfig:
    """The configuration that ``model`` was built from."""
    config: Any = model.config
    if not isinstance(config, ModelConfig):
        raise ValueError(f"model: a {type(model).__name__} belongs to none of Hugging Face's families")
    return config
