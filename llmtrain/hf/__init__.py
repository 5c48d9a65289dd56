"""Checkpoints in Hugging Face's format: the contract of a family of models, each a module of this folder.

No code that comes with a checkpoint is run, and nothing is unpickled: only JSON and safetensors files are read.
"""

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from llmtrain.hf.config_json import ConfigJson
from llmtrain.model import LanguageModel, ModelConfig

HEAD = "lm_head.weight"
SCORE = "score.weight"  # the classifier there
CLASSIFIER = "classifier.weight"  # the classifier here

# Tensors of old versions that are no parameters, of any type: masks, and positions that follow from the configuration.
BUFFERS = re.compile(
    r"(.*\.)?((attn|crossattention|attention|self_attn)\.(bias|masked_bias|causal_mask|rope\.freqs)"
    r"|rotary_emb\.(inv_freq|original_inv_freq|cos_cached|sin_cached)|inv_freq|position_ids|alibi_mask|future_mask"
    r"|causal_mask|attention_mask|masked_bias)"
)


@dataclass(frozen=True)
class TensorMap:
    """Tensors here (``ours``) and in transformers (``theirs``) that hold the same numbers, for both directions.

    The rows of ours, concatenated, equal the rows of theirs, concatenated.  So a map can rename a tensor, join several
    of theirs into one of ours, or split one of theirs into several of ours.
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    rows: tuple[int, ...] = ()  # rows of each of theirs, where there are several
    transposed: bool = False  # theirs is (inputs, outputs)
    may_be_longer: bool = False  # theirs may have more rows than ours: positions that are not used
    zeros: tuple[int, ...] = ()  # shape of theirs where ours is empty: a bias that is missing here and must be 0


class ModelFamily(ABC):
    """The names and config keys of one or more ``model_type``s, in both directions."""

    prefix: ClassVar[str]  # of all names except the head's; checkpoints of a bare model, without a head, lack it
    embedding: ClassVar[str]  # name of the token embedding, which a tied head shares

    @abstractmethod
    def read_config(self, config: ConfigJson) -> ModelConfig:
        """The model that ``config.json`` describes, without dropout.

        Every key that changes the computation is read.  Raises ValueError, naming key and value, for a computation
        that differs from ours.
        """

    @abstractmethod
    def write_config(self, config: ModelConfig, vocab_size: int, *, has_qwen_tokenizer: bool = True) -> dict[str, Any]:
        """The ``config.json`` of a model, with ``model_type`` and ``architectures``.

        ``has_qwen_tokenizer``: its tokenizer splits text as Qwen 2's does, which transformers takes for granted with
        ``model_type`` qwen2.  Raises ValueError, naming our key, for a model that transformers cannot compute.
        """

    @abstractmethod
    def names(self, config: ModelConfig, model_type: str) -> list[TensorMap]:
        """Maps that cover every tensor of a model of ``config`` and of a checkpoint of ``model_type``."""

    def module_names(self, model: LanguageModel) -> dict[str, str]:
        """Their name for each of our modules that has a weight and is a single module there too."""
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
