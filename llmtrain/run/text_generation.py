"""Checks and defaults for generating text with the model of a run."""

import secrets
from dataclasses import dataclass
from pathlib import Path

import torch

from llmtrain.config.exported_text import encoder_of_data
from llmtrain.data.chat.encoder import ConversationEncoder
from llmtrain.data.chat.template import ChatTemplate
from llmtrain.data.chat.templates import find_template
from llmtrain.inference.generate import Sampling
from llmtrain.run.load import InferenceSettings, LoadedModel


@dataclass(frozen=True)
class GenerationSettings(InferenceSettings):
    """The settings that commands that generate text share."""

    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    seed: int | None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens={self.max_tokens}: must be at least 1")
        self.sampling()

    def sampling(self) -> Sampling:
        """The choice of the next token."""
        return Sampling(self.temperature, self.top_k, self.top_p)

    def generator(self, device: torch.device) -> torch.Generator:
        """A generator of random numbers, seeded at random where there is no ``seed``."""
        return torch.Generator(device).manual_seed(secrets.randbits(63) if self.seed is None else self.seed)


def check_generates(trained: LoadedModel, target: Path) -> None:
    """Raise ValueError for a model that was not trained to write text."""
    if not trained.run.objective.generates:
        raise ValueError(
            f"{target}: this run was trained to classify texts, not to write them; use llmtrain predict instead"
        )


def encoder_of(trained: LoadedModel, template: ChatTemplate) -> ConversationEncoder:
    """The encoder of conversations that the run was trained with."""
    return encoder_of_data(trained.run, trained.tokenizer, template)


def template_of(trained: LoadedModel, name: str | None, system: str | None) -> ChatTemplate:
    """The template ``name``, or the one that the run was trained with (None).

    ``system``: the system message of a conversation that has none.  Raises ValueError for an unknown name, or where
    the run was trained with no template.
    """
    if name is None:
        name = getattr(trained.run.data, "template", None)
        if name is None:
            raise ValueError(
                "template=null: the run was trained without a template (its data are not instructions); name one to "
                "chat with, such as template=alpaca or template=plain; llmtrain generate continues any text"
            )
        system = getattr(trained.run.data, "system", None) if system is None else system
    is_split = bool(getattr(trained.run.data, "split_at_responses", False))
    return find_template(name, trained.tokenizer, system=system, split_at_responses=is_split)
