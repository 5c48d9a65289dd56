"""Small random checkpoints of every family, made and saved by transformers."""

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from llmtrain.base.named_generators import NamedGenerators
from llmtrain.hf.auto import AutoModel
from llmtrain.hf.reading import load_weights
from llmtrain.model import LanguageModel

VOCABULARY = 301
NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
GPT2_SIZES: dict[str, Any] = {"vocab_size": VOCABULARY, "n_positions": 64, "n_embd": 48, "n_layer": 3, "n_head": 4}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip

CASES: dict[str, tuple[type, dict[str, Any]]] = {
    "gpt2": (transformers.GPT2Config, GPT2_SIZES),
    "gpt2 untied": (transformers.GPT2Config, GPT2_SIZES | {"tie_word_embeddings": False}),
    "llama": (transformers.LlamaConfig, SIZES),
    "llama tied": (transformers.LlamaConfig, SIZES | {"tie_word_embeddings": True}),
    "llama biases": (transformers.LlamaConfig, SIZES | {"attention_bias": True, "mlp_bias": True}),
    "llama head_dim": (transformers.LlamaConfig, SIZES | {"head_dim": 20}),
    "llama3": (transformers.LlamaConfig, SIZES | {"rope_scaling": LLAMA3, "rope_theta": 500000.0}),
    "linear": (transformers.LlamaConfig, SIZES | {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    "dynamic": (
        transformers.LlamaConfig,
        SIZES | {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}, "max_position_embeddings": 16},
    ),
    "yarn": (
        transformers.LlamaConfig,
        SIZES | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}},
    ),
    "mistral": (transformers.MistralConfig, SIZES | {"sliding_window": 7}),
    "mistral without window": (transformers.MistralConfig, SIZES | {"sliding_window": None}),
    "qwen2": (transformers.Qwen2Config, SIZES | {"tie_word_embeddings": True}),
    "qwen2 windows": (
        transformers.Qwen2Config,
        SIZES | {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    ),
    "qwen3": (transformers.Qwen3Config, SIZES | {"head_dim": 24}),
    "qwen3 biases": (transformers.Qwen3Config, SIZES | {"attention_bias": True, "num_key_value_heads": 1}),
}


def make(kind: type, keys: dict[str, Any], folder: Path, **saving: Any) -> Any:
    """A model of transformers, every parameter of it random, saved in ``folder``."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(kind(**keys, **NO_TOKENS)).eval()
        with torch.no_grad():
            for parameter in model.parameters():  # the norms, which are 1 at first, and the biases, 0, too
                parameter.add_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(folder, **saving)
    return model


def read(folder: Path, **changes: Any) -> LanguageModel:
    """Our model of what is in ``folder``."""
    auto = AutoModel(str(folder), None, 0.0, None)
    config = AutoModel(**(vars(auto) | changes)).resolved()
    assert config.vocab_size is not None
    generators = NamedGenerators(1)
    model = config.create(config.vocab_size, torch.device("cpu"), generators).eval()
    load_weights(model, folder)
    return model


def some_ids(batch: int = 2, length: int = 40) -> Tensor:
    """Token ids ``(batch, length)``."""
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def largest_difference(ours: LanguageModel, theirs: Any, ids: Tensor) -> float:
    """Of the logits that two models give."""
    return (ours(ids)[..., : ours.vocab_size] - theirs(ids).logits).abs().max().item()
