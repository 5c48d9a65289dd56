"""The text side of an export: the tokenizer's files, and the ids that a run was trained to expect of them."""

import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from llmtrain.config.run_config import RunConfig
from llmtrain.data.chat.encoder import ConversationEncoder
from llmtrain.data.chat.markup_template import MarkupTemplate
from llmtrain.data.chat.template import SPECIAL, ChatTemplate, Message
from llmtrain.data.chat.to_jinja import to_jinja
from llmtrain.data.instruction import Instruction
from llmtrain.data.labelled import LabelledText
from llmtrain.hf.tokenizer_export import FILE, export_files
from llmtrain.tokenizer import Tokenizer

# Texts in a few languages and code, and a conversation of three turns.
TEXTS = ("The quick brown fox jumps over", "def area(r):\n    return 3.14159 * r", "Füße, 你好, привет 🙂 1234")
TURNS = (
    ("What does the lamp cost?", "It costs 12.50, with two bulbs."),
    ("And in red? My German is poor: schöne Grüße!", "Red costs the same. Grüße zurück,\nthe shop"),
    ("def f(x):\n    return x", "That returns `x` as it is: f(3) is 3."),
)


class ExpectedIds(NamedTuple):
    """A text, or a conversation, and the ids that training would make of it."""

    what: str  # in words
    text: str  # of a conversation: as rendered, with the names of special tokens
    messages: list[dict[str, str]]  # empty for a text
    asks: bool  # it ends where a response begins
    ids: list[int]


def template_of_data(run: RunConfig, tokenizer: Tokenizer) -> ChatTemplate | None:
    """The template of the run's instructions; None for other data."""
    return run.data.find_template(tokenizer) if isinstance(run.data, Instruction) else None


def encoder_of_data(run: RunConfig, tokenizer: Tokenizer, template: ChatTemplate) -> ConversationEncoder:
    """The encoder of conversations that the run trains with."""
    if isinstance(run.data, Instruction):
        return run.data.conversation_encoder(tokenizer, template)
    return ConversationEncoder(tokenizer, template)


def text_files(run: RunConfig, tokenizer: Tokenizer, model_max_length: int) -> dict[str, str]:
    """Names and contents of the tokenizer's files.  Raises ValueError for a tokenizer that cannot be written."""
    template = template_of_data(run, tokenizer)
    if template is None:
        return export_files(tokenizer, model_max_length)
    source = to_jinja(template, begin=tokenizer.begin_names) if isinstance(template, MarkupTemplate) else None
    named = template.special_names() or set(SPECIAL.findall(tokenizer.chat_template or ""))
    special = encoder_of_data(run, tokenizer, template).special
    marks = {name: id for name, id in special.items() if name in named and name not in tokenizer.special_tokens}
    return export_files(tokenizer, model_max_length, source, marks)


def expected_ids(run: RunConfig, tokenizer: Tokenizer) -> Iterator[ExpectedIds]:
    """Yield texts, and conversations of one to three turns where the run has a template, with their ids."""
    for text in TEXTS:
        if isinstance(run.data, LabelledText):
            ids = run.data.encoder(tokenizer)(text).inputs.tolist()
        else:
            ids = tokenizer.encode_prompt(text)
        yield ExpectedIds(f"the text {text[:20]!r}…", text, [], False, ids)
    template = template_of_data(run, tokenizer)
    if template is None:
        return
    encoder = encoder_of_data(run, tokenizer, template)
    for number in range(1, len(TURNS) + 1):
        turns = [
            Message(role, text)
            for turn in TURNS[:number]
            for role, text in zip(("user", "assistant"), turn, strict=True)
        ]
        what = f"a conversation of {number} turn{'s' * (number > 1)}"
        for messages, asks in ((turns, False), (turns[:-1], True)):
            parts = template.render(messages, add_generation_prompt=asks)
            plain = [{"role": message.role, "content": message.content} for message in messages]
            said = f"{what}, up to its last response" if asks else what
            yield ExpectedIds(said, encoder.text(parts), plain, asks, encoder(parts).ids.tolist())


def describe_difference(ours: Sequence[int], theirs: Sequence[int], tokenizer: Tokenizer) -> str:
    """The first tokens that differ, in words."""
    pairs = zip(ours, theirs, strict=False)
    first = next((i for i, (one, other) in enumerate(pairs) if one != other), min(len(ours), len(theirs)))

    def shown(ids: Sequence[int]) -> str:
        return " ".join(repr(tokenizer.decode([id])) for id in ids[first : first + 4]) or "nothing"

    return f"from token {first + 1} on training sees {shown(ours)}, transformers {shown(theirs)}"


def differences(run: RunConfig, tokenizer: Tokenizer, contents: dict[str, str]) -> Iterator[str]:
    """Yield where the ``tokenizer.json`` among ``contents`` gives other ids than training sees, in words."""
    import tokenizers

    written: Any = tokenizers.Tokenizer.from_str(contents[FILE])
    written.no_truncation()
    written.no_padding()
    for expected in expected_ids(run, tokenizer):
        if not expected.messages and isinstance(run.data, LabelledText):
            continue  # an export puts the tokens around the text that this data has
        found = written.encode(expected.text, add_special_tokens=not expected.messages).ids
        if found != expected.ids:
            yield f"{expected.what}: {describe_difference(expected.ids, found, tokenizer)}"


def written_differently(contents: dict[str, str], source: str) -> list[str]:
    """The parts of a ``tokenizer.json`` that differ from those of ``source``, the one that it was made from."""
    if contents[FILE] == source:
        return []
    ours, theirs = json.loads(contents[FILE]), json.loads(source)
    return [key for key in ours if ours[key] != theirs.get(key) and key not in ("truncation", "padding")]
