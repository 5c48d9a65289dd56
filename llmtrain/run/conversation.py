"""Talking to a trained model in the template that it was taught."""

import json
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from llmtrain.base.files import write_atomically
from llmtrain.data.chat.templates import Message, PartEncoder, Template, find_template
from llmtrain.inference.generate import Sampling, as_text, generate
from llmtrain.run.load import Trained


def check_writes(trained: Trained, target: Path) -> None:
    """Raise ValueError for a model that was not trained to write text: what it would write is noise."""
    if not trained.run.objective.generates:
        raise ValueError(
            f"{target}: this run was trained to tell classes apart, not to write text; llmtrain predict asks it"
        )


def template_of(trained: Trained, name: str | None, system: str | None) -> Template:
    """The template ``name``; None: the one that the run was taught.  ``system``: what the system says in it.

    Raises ValueError where there is no such one, or the run was taught none.
    """
    if name is None:
        name = getattr(trained.run.data, "template", None)
        if name is None:
            raise ValueError(
                "template=null: the run was not taught one (its data are no instructions); name the one to talk in, "
                "such as template=alpaca, or template=plain; llmtrain generate goes on from any text"
            )
        system = getattr(trained.run.data, "system", None) if system is None else system
    return find_template(name, trained.tokenizer, system=system)


@dataclass
class Conversation:
    """The messages so far, and a model that answers."""

    trained: Trained
    template: Template
    sampling: Sampling
    max_tokens: int  # of a reply
    generator: torch.Generator
    messages: list[Message] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.encoder = PartEncoder(self.trained.tokenizer, self.template)
        self.stop_ids, self.stop_texts = self.encoder.stops(self.template)

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """The ids that a reply to ``messages`` goes on from."""
        return self.encoder.prompt(self.template.render(messages, add_generation_prompt=True))

    @property
    def room(self) -> int:
        """Tokens that the model can still read and write before the beginning is forgotten; negative: it is already."""
        return self.trained.model.context_length - len(self.prompt(self.messages))

    def reply(self, text: str) -> Generator[str, None, None]:
        """Say ``text`` and give out the reply as it comes; both are in ``messages`` once it is through, or left off."""
        asked = [*self.messages, Message("user", text)]
        precision, tokenizer = self.trained.precision, self.trained.tokenizer
        said: list[str] = []
        try:
            with precision.autocast():
                ids = generate(
                    self.trained.model,
                    self.prompt(asked),
                    max_tokens=self.max_tokens,
                    sampling=self.sampling,
                    generator=self.generator,
                    dtype=precision.dtype,
                    end_of_text=tokenizer.end_of_text,
                    stops=self.stop_ids,
                )
                for piece in as_text(ids, tokenizer.decode_bytes, self.stop_texts):
                    said.append(piece)
                    yield piece
        finally:
            self.messages = [*asked, Message("assistant", "".join(said).strip())]

    def reset(self) -> None:
        """Forget all that was said, but for what the system says."""
        self.messages = [message for message in self.messages if message.role == "system"]

    def save(self, path: Path) -> None:
        """Append the conversation to the JSONL file ``path``, as ``data=instruction`` reads it."""
        row = {"messages": [{"role": message.role, "content": message.text} for message in self.messages]}
        before = path.read_text(encoding="utf-8") if path.exists() else ""
        write_atomically(path, before + json.dumps(row, ensure_ascii=False) + "\n")
