"""The registry of model families: from a ``model_type`` or a model of ours to its family."""

import importlib

from llmtrain.hf import CLASSIFIER, HEAD, SCORE, ModelFamily, TensorMap, config_of
from llmtrain.hf.config_json import ConfigJson
from llmtrain.model import LanguageModel, ModelConfig
from llmtrain.model.gpt import GPTConfig
from llmtrain.model.llama import LlamaConfig, Position

FAMILIES = {  # model_type: module and class
    "gpt2": "llmtrain.hf.gpt2.GPT2Family",
    "llama": "llmtrain.hf.llama.LlamaFamily",
    "mistral": "llmtrain.hf.llama.LlamaFamily",
    "qwen2": "llmtrain.hf.llama.LlamaFamily",
    "qwen3": "llmtrain.hf.llama.LlamaFamily",
    "baichuan": "llmtrain.hf.baichuan.BaichuanFamily",
}


def family_of_checkpoint(config: ConfigJson) -> ModelFamily:
    """The family of a checkpoint.  Raises ValueError for an unknown ``model_type``."""
    model_type = config.text("model_type")
    if model_type not in FAMILIES:
        config.refuse("model_type", f"not a known family; the known ones are: {', '.join(FAMILIES)}")
    return _load_family(model_type)


def family_of_model(config: ModelConfig) -> ModelFamily:
    """The family that a model of ours is written as.  Raises ValueError if there is none."""
    if isinstance(config, GPTConfig):
        return _load_family("gpt2")
    if isinstance(config, LlamaConfig):
        return _load_family("baichuan" if config.normalised_head or config.position is Position.alibi else "llama")
    raise ValueError(f"model._target_={type(config).__name__}: no family of Hugging Face's computes this model")


def module_names(model: LanguageModel) -> dict[str, str]:
    """As :meth:`ModelFamily.module_names`, for the family of ``model``."""
    return family_of_model(config_of(model)).module_names(model)


def with_classifier(maps: list[TensorMap]) -> list[TensorMap]:
    """The maps of a ``…ForSequenceClassification``: a linear layer for classes replaces the one for tokens."""
    return [*(each for each in maps if each.theirs != (HEAD,)), TensorMap((CLASSIFIER,), (SCORE,))]


def _load_family(model_type: str) -> ModelFamily:
    module, _, name = FAMILIES[model_type].rpartition(".")
    family: ModelFamily = getattr(importlib.import_module(module), name)()
    return family
