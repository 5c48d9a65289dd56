"""A small GPT-2 and a small Llama, ours and transformers', with the same random weights."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from llmtrain.base.named_generators import NamedGenerators
from llmtrain.hf.config_json import ConfigJson
from llmtrain.hf.families import family_of_checkpoint, module_names
from llmtrain.hf.reading import load_weights
from llmtrain.lora.low_rank import LowRankAdaptation
from llmtrain.model import LanguageModel
from tests.helpers.options import make_option, option_names

VOCABULARY = 101  # less than a multiple of 64: padded inside
IDS = torch.randint(0, VOCABULARY, (3, 24), generator=torch.Generator().manual_seed(7))
KINDS = [name for name in option_names("lora") if name != "none"]
COMMON = {"rank": 4, "alpha": 6.0}
FAMILIES = ("gpt2", "gpt2 untied", "llama")


class Pair(NamedTuple):
    """The same weights twice."""

    ours: LanguageModel
    theirs: Any
    directory: Path  # of transformers
    names: dict[str, str]
    transposed: bool


def make_theirs(family: str) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(5)
    if family.startswith("gpt2"):
        config = transformers.GPT2Config(
            vocab_size=VOCABULARY, n_positions=32, n_embd=48, n_layer=2, n_head=4, resid_pdrop=0, embd_pdrop=0,
            attn_pdrop=0, tie_word_embeddings=family == "gpt2",
        )  # fmt: skip
        model = transformers.GPT2LMHeadModel(config)
    else:
        config = transformers.LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=False,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def read_ours(directory: Path) -> LanguageModel:
    """Our model of a directory of transformers."""
    values = ConfigJson.read(directory)
    config = family_of_checkpoint(values).read_config(values)
    assert config.vocab_size is not None
    model = config.create(config.vocab_size, torch.device("cpu"), NamedGenerators(0))
    load_weights(model, directory)
    return model.eval()


def make_pair(family: str, folder: Path) -> Pair:
    """Saved by transformers in a directory below ``folder``, and read from there by both."""
    transformers = pytest.importorskip("transformers")
    directory = folder / family.replace(" ", "-")
    make_theirs(family).save_pretrained(directory)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    ours = read_ours(directory)
    return Pair(ours, theirs, directory, module_names(ours), family.startswith("gpt2"))


def make(kind: str = "lora", **keys: Any) -> LowRankAdaptation:
    return replace(make_option("lora", kind, COMMON), **keys)


def seeded(seed: int = 3) -> NamedGenerators:
    return NamedGenerators(seed)


@torch.no_grad()
def stir(model: torch.nn.Module, seed: int = 11) -> None:
    """Values that make every trained parameter matter, the same for parameters of one shape and place."""
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def logits(model: LanguageModel, ids: Tensor = IDS) -> Tensor:
    """Without the vocabulary's padding."""
    return model(ids)[..., : model.vocab_size]


def edit(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
