"""A conversation with a model, in a chat template."""

import json
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from llmtrain.base.outputs import check_output, is_stream, open_output
from llmtrain.data.chat.encoder import ConversationEncoder
from llmtrain.data.chat.template import ChatTemplate, Message
from llmtrain.inference.generate import Sampling, generate, stream_text, without_first_space
from llmtrain.model import LanguageModel
from llmtrain.precision import Precision
from llmtrain.tokenizer import Tokenizer


@dataclass
class Conversation:
    """The messages so far, and the model that replies to them."""

    model: LanguageModel
    tokenizer: Tokenizer
    precision: Precision
    template: ChatTemplate
    encoder: ConversationEncoder
    sampling: Sampling
    max_tokens: int  # of a reply
    generator: torch.Generator
    messages: list[Message] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.stop_ids, self.stop_texts = self.encoder.stops(self.template)

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """The ids that come before a reply to ``messages``."""
        return self.encoder.prompt(self.template.render(messages, add_generation_prompt=True))

    @property
    def room(self) -> int:
        """Tokens left in the context before the model no longer sees the beginning; negative: it no longer does."""
        return self.model.context_length - len(self.prompt(self.messages))

    def reply(self, text: str) -> Generator[str, None, None]:
        """Stream the reply to ``text``; at its end, or when it is closed early, both are in ``messages``."""
        asked = [*self.messages, Message("user", text)]
        pieces: list[str] = []
        try:
            with self.precision.autocast():
                ids = generate(
                    self.model,
                    self.prompt(asked),
                    max_tokens=self.max_tokens,
                    sampling=self.sampling,
                    generator=self.generator,
                    dtype=self.precision.dtype,
                    end_of_text=self.tokenizer.end_of_text,
                    stops=self.stop_ids,
                )
                for piece in without_first_space(stream_text(ids, self.tokenizer.decode_bytes, self.stop_texts)):
                    pieces.append(piece)
                    yield piece
        finally:
            self.messages = [*asked, Message("assistant", "".join(pieces).strip())]

    def reset(self) -> None:
        """Drop all messages except the system message."""
        self.messages = [message for message in self.messages if message.role == "system"]

    def save(self, name: str) -> None:
        """Append the conversation to the JSONL file ``name``, as ``data=instruction`` reads it.

        Raises ValueError or OSError if it cannot be written there.
        """
        check_output("/save", name)
        row = {"messages": [{"role": message.role, "content": message.text} for message in self.messages]}
        path = Path(name)
        before = path.read_text(encoding="utf-8") if not is_stream(name) and path.exists() else ""
        end = "\n" if before and not before.endswith("\n") else ""
        with open_output("/save", name) as file:
            file.write(before + end + json.dumps(row, ensure_ascii=False) + "\n")
