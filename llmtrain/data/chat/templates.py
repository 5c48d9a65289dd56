"""Conversations as text: what stands around the messages, and which of it a model is taught.

A template renders messages to parts, each of which knows who wrote it.  Names of special tokens become their ids in
what the template adds and never in a message, so that nobody can end a turn or speak for another by typing a name.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto
from itertools import pairwise
from string import Formatter
from typing import NamedTuple

import numpy as np

from llmtrain.base.checks import did_you_mean
from llmtrain.data import IGNORE
from llmtrain.tokenizer import Tokenizer

FIELDS = ("prompt", "instruction", "input", "response")  # of a template of the user's own
SPECIAL = re.compile(r"<\|[^|<>\s]+\|>|<reserved_\d+>")  # how names of special tokens look in the templates here


class Message(NamedTuple):
    """What one side says."""

    role: str  # system, user, assistant; or one that a tokenizer's own template knows
    content: str
    input: str = ""  # what an instruction is to be done to, if that is given apart

    @property
    def text(self) -> str:
        """Content and input in one."""
        return f"{self.content}\n\n{self.input}" if self.input else self.content


class Kind(Enum):
    """Who a part is from."""

    message = auto()  # somebody's words: whatever stands in them is text
    markup = auto()  # the template's own: names of special tokens are those tokens
    begin = auto()  # the token that a text begins with, where the tokenizer has one
    end = auto()  # the token that ends a text


class Part(NamedTuple):
    """A stretch of a rendered conversation."""

    text: str
    is_trained: bool = False  # whether its tokens are to be predicted
    kind: Kind = Kind.message
    ends_text: bool = False  # what is to be predicted in place of its first token is the end of the text
    is_apart: bool = False  # whether no token goes over its borders: what is a target in one place is one in all


class Encoded(NamedTuple):
    """A rendered conversation as ids."""

    ids: np.ndarray  # (tokens,) uint32
    wanted: np.ndarray  # (tokens,) int64: what is to be predicted at the place of each; IGNORE: nothing


class Template(ABC):
    """Contract of a template."""

    stop: tuple[str, ...]  # what ends a response, besides the token that ends a text: a special token's name, or text

    @abstractmethod
    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = False,
        trained: Collection[int] | None = None,
    ) -> list[Part]:
        """The parts of a conversation; with ``add_generation_prompt`` up to where a response is to begin.

        ``trained``: which of the messages, by number, are taught, each with what ends it; None: the assistant's.
        Raises ValueError for messages that the template has no place for.
        """

    def special_names(self) -> frozenset[str]:
        """Special tokens that the template names."""
        return frozenset()

    def spelled_out(self, tokenizer: Tokenizer) -> list[str]:
        """Those that are no tokens of ``tokenizer`` and stand as text, as far as that is known beforehand; sorted."""
        return sorted(self.special_names() - special_tokens(tokenizer, self.special_names()).keys())


# --- to ids -------------------------------------------------------------------------------------------------------


def special_tokens(tokenizer: Tokenizer, names: Collection[str] = ()) -> dict[str, int]:
    """Special tokens by name, and those of ``names`` and of the templates here that are a token though no special one.

    Baichuan's files declare their reserved ones as ordinary pieces or as such as are found in any text.
    """
    found = dict(tokenizer.special_tokens)
    for name, token in RESERVED.items():
        if token < tokenizer.vocab_size and tokenizer.decode_bytes([token]) == name.encode():
            found.setdefault(name, token)
    known = (name for template in TEMPLATES.values() for name in template.special_names())
    for name in {*known, *SPECIAL.findall(tokenizer.chat_template or ""), *names} - found.keys():
        ids = tokenizer.encode_continuation(name).tolist()
        if len(ids) == 1 and tokenizer.decode_bytes(ids) == name.encode():
            found[name] = ids[0]
    return found


class PartEncoder:
    """Parts to ids.

    Text is encoded up to where a special token stands or a response begins or ends, each stretch by itself: so the
    targets are exact, and a prompt has the same ids in training and when a model is asked.  No merge of the tokenizer
    goes over such a border, where it might in a text that is encoded as a whole.
    """

    def __init__(self, tokenizer: Tokenizer, template: Template | None = None) -> None:
        self.tokenizer = tokenizer
        self.special = special_tokens(tokenizer, () if template is None else template.special_names())
        names = sorted(self.special, key=len, reverse=True)  # the longest wins
        self.pattern = re.compile(f"({'|'.join(map(re.escape, names))})") if names else None

    def __call__(self, parts: Sequence[Part]) -> Encoded:
        ids: list[np.ndarray] = []
        wanted: list[np.ndarray] = []
        run = ""  # of text that is not encoded yet
        is_trained = ends_text = is_under_way = False

        def add(new: np.ndarray) -> None:
            nonlocal is_under_way
            is_under_way |= part.kind is not Kind.begin  # the text begins behind the token for that
            targets = new.astype(np.int64) if is_trained else np.full(len(new), IGNORE)
            if ends_text and len(new):
                targets[0] = self.tokenizer.end_of_text
                targets[1:] = IGNORE
            ids.append(new)
            wanted.append(targets)

        def flush() -> None:
            nonlocal run
            if run:
                add(self._encode(run, is_under_way))
            run = ""

        for part in parts:
            if part.is_apart or part.is_trained != is_trained:
                flush()
            is_trained, ends_text = part.is_trained, part.ends_text
            for piece in self._pieces(part):
                if isinstance(piece, str):
                    run += piece
                else:
                    flush()
                    add(np.array([piece], np.uint32))
            if part.is_apart:
                flush()
        flush()
        if not ids:
            return Encoded(np.empty(0, np.uint32), np.empty(0, np.int64))
        return Encoded(np.concatenate(ids), np.concatenate(wanted))

    def prompt(self, parts: Sequence[Part]) -> list[int]:
        """The ids alone."""
        return self(parts).ids.tolist()

    def stops(self, template: Template) -> tuple[frozenset[int], tuple[str, ...]]:
        """What ends a response: ids, and strings where the tokenizer has no token of that name."""
        ids = {self.special[name] for name in template.stop if name in self.special}
        return frozenset({*ids, self.tokenizer.end_of_text}), tuple(s for s in template.stop if s not in self.special)

    def _encode(self, text: str, is_under_way: bool) -> np.ndarray:
        """Ids of text, in which a name is text too, even where the tokenizer finds that token in any text."""
        ids = (self.tokenizer.encode_continuation if is_under_way else self.tokenizer.encode)(text)
        found = [] if self.pattern is None else [m for m in self.pattern.finditer(text) if len(m[0]) > 1]
        if not found or not np.isin(ids, [self.special[match[0]] for match in found]).any():
            return ids
        borders = [0, *(match.start() + 1 for match in found), len(text)]  # no name is whole between two of them
        stretches = [text[start:end] for start, end in pairwise(borders) if start < end]
        return np.concatenate([self._encode(each, is_under_way or i > 0) for i, each in enumerate(stretches)])

    def _pieces(self, part: Part) -> list[str | int]:
        match part.kind:
            case Kind.begin:
                return [] if self.tokenizer.bos is None else [self.tokenizer.bos]
            case Kind.end:
                return [self.tokenizer.end_of_text]
            case Kind.markup if self.pattern is not None:
                pieces = self.pattern.split(part.text)
                return [self.special[piece] if i % 2 else piece for i, piece in enumerate(pieces) if piece]
        return [part.text]


# --- templates as data ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Markup(Template):
    """A template of fixed text around the messages.

    ``{system}``, ``{prompt}`` (a message with its input), ``{instruction}`` and ``{input}`` (the two apart) stand for
    what is said.
    """

    user: str
    before: str = ""  # a response
    end: str = ""  # of a response, taught with it; empty: the token that ends a text
    after: str = ""  # a response, if something follows or the template always has it
    user_with_input: str | None = None  # None: as ``user``
    system: str = "{system}\n\n"
    default_system: str = ""
    default_with_input: str | None = None  # where the first message has an input
    begins_text: bool = False  # with the token for that, where the tokenizer has one
    strips: bool = False  # white space around messages
    ends_once: bool = False  # the token that ends a text stands behind the last response, and is taught behind each

    @property
    def stop(self) -> tuple[str, ...]:  # type: ignore[override]
        return (self.end,) if self.end else ()

    def special_names(self) -> frozenset[str]:
        texts = (self.user, self.user_with_input or "", self.before, self.end, self.after, self.system)
        return frozenset(name for text in texts for name in SPECIAL.findall(text))

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = False,
        trained: Collection[int] | None = None,
    ) -> list[Part]:
        numbered = self._with_system(messages)
        parts = [Part("", kind=Kind.begin)] if self.begins_text else []
        is_answer = was_taught = False  # the message before
        for number, message in numbered:
            is_taught = message.role == "assistant" and (trained is None or number in trained)
            if message.role == "assistant":
                content = message.content.strip() if self.strips else message.content
                is_last = number == numbered[-1][0] and not add_generation_prompt
                parts += [Part(self.before, kind=Kind.markup), Part(content, is_taught, is_apart=True)]
                if self.end:
                    parts.append(Part(self.end, is_taught, Kind.markup, is_apart=True))
                elif is_last or not self.ends_once:
                    parts.append(Part("", is_taught, Kind.end, is_apart=True))
                if not is_last:
                    parts.append(Part(self.after, kind=Kind.markup))
            else:
                before = self._fill(message)
                if self.ends_once and is_answer and before:
                    before[0] = before[0]._replace(is_trained=was_taught, ends_text=was_taught, is_apart=True)
                parts += before
            is_answer, was_taught = message.role == "assistant", is_taught
        if add_generation_prompt:
            parts.append(Part(self.before, kind=Kind.markup))
        return [part for part in parts if part.text or part.kind in (Kind.begin, Kind.end)]

    def _with_system(self, messages: Sequence[Message]) -> list[tuple[int, Message]]:
        """The messages with their numbers, before them what the system says if they do not begin with that."""
        numbered = list(enumerate(messages))
        for number, message in numbered:
            if message.role not in ("system", "user", "assistant"):
                raise ValueError(
                    f"message {number + 1} is of role {message.role!r}; the template has places for system, user and "
                    "assistant"
                )
            if message.role == "system" and number:
                raise ValueError(f"message {number + 1} is of role 'system', which can only come first")
        if messages and messages[0].role == "system":
            return numbered
        has_input = bool(messages and messages[0].input)
        system = self.default_with_input if has_input and self.default_with_input else self.default_system
        return [(-1, Message("system", system)), *numbered] if system else numbered

    def _fill(self, message: Message) -> list[Part]:
        """A message of the system's or the user's, in what stands around it."""
        form = self.system if message.role == "system" else self.user
        if message.input and self.user_with_input is not None:
            form = self.user_with_input
        apart = {"instruction": message.content, "input": message.input}
        values = {"system": message.text, "prompt": message.text, **apart}
        parts = []
        for literal, name, _, _ in Formatter().parse(form):
            parts.append(Part(literal, kind=Kind.markup))
            if name:
                parts.append(Part(values[name].strip() if self.strips else values[name]))
        return [part for part in parts if part.text]


RESERVED = {"<reserved_106>": 195, "<reserved_107>": 196}  # Baichuan 2: user_token_id, assistant_token_id

TEMPLATES: Mapping[str, Markup] = {
    # Taori et al. 2023, https://github.com/tatsu-lab/stanford_alpaca, with the line break before the response that
    # alpaca-lora and others put there
    "alpaca": Markup(
        user="### Instruction:\n{instruction}\n\n",
        user_with_input="### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n",
        before="### Response:\n",
        after="\n\n",
        default_system="Below is an instruction that describes a task. Write a response that appropriately completes "
        "the request.",
        default_with_input="Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.",
        begins_text=True,
    ),
    # OpenAI's Chat Markup Language; Qwen, SmolLM2 and others
    "chatml": Markup(
        system="<|im_start|>system\n{system}<|im_end|>\n",
        user="<|im_start|>user\n{prompt}<|im_end|>\n",
        before="<|im_start|>assistant\n",
        end="<|im_end|>",
        after="\n",
    ),
    # https://www.llama.com/docs/model-cards-and-prompt-formats/meta-llama-3
    "llama3": Markup(
        system="<|start_header_id|>system<|end_header_id|>\n\n{system}<|eot_id|>",
        user="<|start_header_id|>user<|end_header_id|>\n\n{prompt}<|eot_id|>",
        before="<|start_header_id|>assistant<|end_header_id|>\n\n",
        end="<|eot_id|>",
        begins_text=True,
        strips=True,
    ),
    # Baichuan 2's own fine-tuning: a reserved id before each message and nothing between them.  The end of the text
    # stands at the very end alone; behind each earlier response it is what is to be predicted, while the next user's
    # marker is what is read.
    "baichuan": Markup(
        system="{system}",
        user="<reserved_106>{prompt}",
        before="<reserved_107>",
        ends_once=True,
    ),
    "plain": Markup(user="{prompt}", begins_text=True),  # the messages and nothing else, the end of the text behind
}
OWN = "tokenizer"  # the template that came with the tokenizer


def find_template(name: str, tokenizer: Tokenizer, *, system: str | None = None) -> Template:
    """The template ``name``: of :data:`TEMPLATES`, the tokenizer's own, or a text with fields such as ``{prompt}``.

    ``system``: what the system says where a conversation does not begin with it; None: what is usual.  Raises
    ValueError, with what there is, for a name or a field that is not known, or a tokenizer without a template.
    """
    if name == OWN:
        from llmtrain.data.chat.jinja_template import ChatTemplate  # jinja2 is needed for no other

        return ChatTemplate.of(tokenizer, system)
    template = parse_template(name)
    if system is not None:
        return replace(template, default_system=system, default_with_input=system)
    return template


def parse_template(name: str) -> Markup:
    """One of :data:`TEMPLATES`, or one of the user's own.  Raises ValueError as :func:`find_template` does."""
    if name in TEMPLATES:
        return TEMPLATES[name]
    if "{" in name:
        return _parse_form(name)
    names = [*TEMPLATES, OWN]
    raise ValueError(
        f"template={name}: there is no such template{did_you_mean(name, names)}; there are {', '.join(names)}, and a "
        "text of your own with fields, such as 'Q: {prompt} A: {response}'"
    )


def _parse_form(form: str) -> Markup:
    """A template of the user's own: a turn of each side, with fields."""
    try:
        pieces = list(Formatter().parse(form))
    except ValueError as error:
        raise ValueError(f"template={form!r}: {error}; a brace that is no field is written twice") from error
    texts, names = [""], []  # the text around the fields, one more than these
    for literal, name, specification, conversion in pieces:
        texts[-1] += literal
        if name is None:
            continue
        if name not in FIELDS or specification or conversion:
            raise ValueError(
                f"template={form!r}: there is no field {{{name}}}{did_you_mean(name, FIELDS)}; there are "
                f"{', '.join(f'{{{field}}}' for field in FIELDS)}"
            )
        names.append(name)
        texts.append("")
    if names.count("response") != 1 or names[-1] != "response" or not {"prompt", "instruction"} & set(names):
        raise ValueError(
            f"template={form!r}: {{prompt}} or {{instruction}} has to be in it, and behind it, once, {{response}}"
        )
    doubled = (text.replace("{", "{{").replace("}", "}}") for text in texts[:-2])
    user = "".join(f"{text}{{{name}}}" for text, name in zip(doubled, names, strict=False))
    return Markup(user=user, before=texts[-2], end=texts[-1], begins_text=True)
