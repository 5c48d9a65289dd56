"""A tokenizer's own template: text and trained stretches as in transformers, and nothing of a row lost."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from llmtrain.data import IGNORE
from llmtrain.data.chat.chat_rows import ChatRow, read_messages
from llmtrain.data.chat.encoder import ConversationEncoder
from llmtrain.data.chat.jinja_template import JinjaTemplate
from llmtrain.data.chat.template import PartKind
from llmtrain.tokenizer import Tokenizer
from llmtrain.tokenizer.huggingface import HuggingFace
from tests.data.chat.test_templates import Chat

USER = "{% if m.role != 'assistant' %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% else %}"
HEADER = "{{ '<|im_start|>assistant\n' }}"
PROMPT = "{% if add_generation_prompt %}" + HEADER + "{% endif %}"
PLAIN = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"


def marked(response: str, prompt: str = PROMPT) -> str:
    return "{% for m in messages %}" + USER + HEADER + response + "{{ '\n' }}{% endif %}{% endfor %}" + prompt


MARKED = {  # stretches that are marked, in the manners of published templates
    "with its end": marked("{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"),
    "without its end": marked("{% generation %}{{ m.content }}{% endgeneration %}{{ '<|im_end|>' }}"),
    "no prompt": marked("{%- generation -%}{{ m.content + '<|im_end|>' }}{%- endgeneration -%}", ""),
    "two stretches": marked(
        "{% generation %}{{ m.content }}{% endgeneration %} (said) "
        "{% generation %}{{ '<|im_end|>' }}{% endgeneration %}"
    ),
    "with the header": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}" + HEADER
    + "{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}" + PROMPT,
}  # fmt: skip
TOOLS = (  # in the manner of Qwen's
    "{% if tools %}{{ '<|im_start|>system\n' }}{% for t in tools %}{{ t | tojson }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% endif %}{% for m in messages %}" + USER + HEADER + "{% generation %}"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{% if m.content %}{{ m.content }}"
    "{% endif %}{% for c in m.tool_calls %}<call>{{ c.function | tojson }}</call>{% endfor %}"
    "{{ '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% endif %}{% endfor %}" + PROMPT
)
HI = [{"role": "user", "content": "Hi <|im_end|>"}, {"role": "assistant", "content": "Hello."}]
TURNS = [*HI, {"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "The sum is ä 2"}]
CALLS = [
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": None,
     "tool_calls": [{"type": "function", "function": {"name": "look_up", "arguments": {"town": "Ä"}}}]},
    {"role": "tool", "name": "look_up", "content": "12"},
    {"role": "assistant", "content": "It is 12.", "thinking": "so says the tool"},
]  # fmt: skip
TOOL = [{"name": "look_up", "parameters": {"town": "string"}}]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, PreTrainedTokenizerFast]:
    """A tokenizer, as this program reads it and as transformers does."""
    import tokenizers

    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()
    )
    library.train_from_iterator([(Path(__file__).parents[3] / "data" / "lighthouse.txt").read_text()], trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    theirs = PreTrainedTokenizerFast(tokenizer_object=library, eos_token=special[0])
    theirs.save_pretrained(folder)
    return HuggingFace(path=str(folder), end_of_text=None, version=2).build(), theirs


def encode(source: str, tokenizer: Tokenizer, row: ChatRow, **settings: Any) -> tuple[list[int], list[int]]:
    template = JinjaTemplate(source, tokenizer)
    parts = template.render(row.messages, variables=row.variables, **settings)
    encoded = ConversationEncoder(tokenizer, template)(parts)
    return encoded.ids.tolist(), (encoded.targets != IGNORE).astype(int).tolist()


def text(source: str, messages: list[dict[str, Any]], **settings: Any) -> str:
    row = read_messages(messages, "row")
    parts = JinjaTemplate(source, Chat()).render(row.messages, **settings)
    assert all(part.kind is PartKind.markup for part in parts)
    return "".join(part.text for part in parts)


def taught(source: str, messages: list[dict[str, Any]], **settings: Any) -> list[str]:
    """The stretches that are trained."""
    row, stretches, was_trained = read_messages(messages, "row"), [], False
    for part in JinjaTemplate(source, Chat()).render(row.messages, **settings):
        if part.is_trained:
            stretches[-1:] = [stretches[-1] + part.text] if was_trained else [*stretches[-1:], part.text]
        was_trained = part.is_trained
    return stretches


# --- what is trained ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MARKED)
def test_marks_decide_as_in_transformers(both: tuple[Tokenizer, PreTrainedTokenizerFast], name: str) -> None:
    ours, theirs = both
    plain = [{**m, "content": m["content"].replace("<|im_end|>", "end")} for m in TURNS]
    for messages in (plain[:2], plain, [{"role": "system", "content": "Be kind."}, *plain]):
        expected = theirs.apply_chat_template(
            messages, chat_template=MARKED[name], return_dict=True, return_assistant_tokens_mask=True
        )
        found = encode(MARKED[name], ours, read_messages(messages, "row"))
        assert found == (expected["input_ids"], expected["assistant_masks"])
        assert 0 < sum(found[1]) < len(found[1])


def test_calls_and_reasoning_are_rendered_and_trained_as_in_transformers(
    both: tuple[Tokenizer, PreTrainedTokenizerFast],
) -> None:
    ours, theirs = both
    row = ChatRow(read_messages(CALLS, "row").messages, variables={"tools": TOOL})
    expected = theirs.apply_chat_template(
        CALLS, tools=TOOL, chat_template=TOOLS, return_dict=True, return_assistant_tokens_mask=True
    )
    assert encode(TOOLS, ours, row) == (expected["input_ids"], expected["assistant_masks"])
    assert JinjaTemplate(TOOLS, ours).unread(row.messages, row.variables) == [(2, "name")]


@pytest.mark.parametrize("name", MARKED)
def test_marks_of_messages_without_loss_are_left_out(name: str) -> None:
    first, last = (taught(MARKED[name], TURNS, trained=[number]) for number in (1, 3))
    assert first
    assert last
    assert taught(MARKED[name], TURNS) == first + last
    assert "2" not in "".join(first)
    assert "Hello" not in "".join(last)


def test_the_header_of_a_role_carries_no_loss() -> None:
    """Also where a template writes it without a generation prompt, and then the prompt of a response has it."""
    assert taught(PLAIN, TURNS) == ["Hello.<|im_end|>", "The sum is ä 2<|im_end|>"]
    assert text(PLAIN, TURNS[:1], add_generation_prompt=True).endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert JinjaTemplate(PLAIN, Chat()).lacking_prompt == "<|im_start|>assistant\n"
    assert JinjaTemplate(PLAIN + PROMPT, Chat()).lacking_prompt == ""
    assert taught(PLAIN, [{"role": "assistant", "content": "I begin."}, *TURNS])[0] == "I begin.<|im_end|>"
    llama2 = (
        "{% for m in messages %}{{ '[I]' + m.content + '[/I]' if m.role == 'user' else ' ' + m.content }}{% endfor %}"
    )
    assert taught(llama2, TURNS) == [" Hello.", " The sum is ä 2"]  # the model has to write the space


# --- what is not rendered -------------------------------------------------------------------------------------------


def unread(source: str, messages: list[dict[str, Any]], **variables: Any) -> list[tuple[int | None, str]]:
    return [
        tuple(each) for each in JinjaTemplate(source, Chat()).unread(read_messages(messages, "row").messages, variables)
    ]


def test_everything_that_does_not_change_the_text_is_named() -> None:
    assert unread(PLAIN, TURNS) == []
    assert unread(PLAIN, [{**TURNS[0], "id": 3, "mood": "glad"}, TURNS[1]], tools=TOOL) == [
        (0, "id"), (0, "mood"), (None, "tools"),
    ]  # fmt: skip
    assert (1, "tool_calls") in unread(PLAIN, CALLS)
    assert unread("{% for m in messages %}{{ m | tojson }}{% endfor %}", [{**TURNS[0], "id": 3}, TURNS[1]]) == []
    early = "{% for m in messages %}{% if loop.last %}{{ m.reasoning_content }}{% endif %}{{ m.content }}{% endfor %}"
    thought = {"role": "assistant", "content": "No.", "reasoning_content": "hm"}
    assert unread(early, [TURNS[0], thought, TURNS[2], thought]) == [(1, "reasoning_content")]


def test_messages_of_a_role_that_the_template_passes_over_are_named() -> None:
    source = "{% for m in messages %}{% if m.role in ('user', 'assistant') %}{{ m.content }}{% endif %}{% endfor %}"
    answer = {"role": "assistant", "content": "It is 12 there."}
    assert unread(source, [TURNS[0], {"role": "tool", "content": "12"}, answer]) == [(1, "content")]


def test_a_switch_of_the_template_is_no_lost_value() -> None:
    source = PLAIN + "{% if think is defined and not think %}(quick){% endif %}"
    assert unread(source, TURNS, think=True) == []
    assert unread(source, TURNS, thonk=True) == [(None, "thonk")]


@pytest.mark.parametrize("content", ["{{ m.content }}", "{{ 'said: ' + m.content }}", "{{ m.content or '' }}"])
def test_a_call_without_content_never_teaches_the_word_none(content: str) -> None:
    source = (
        "{% for m in messages %}" + content + "{% for c in m.tool_calls %}{{ c | tojson }}{% endfor %};{% endfor %}"
    )
    assert "None" not in text(source, CALLS)
    is_none = "{% for m in messages %}{% if m.content is none %}[call]{% else %}{{ m.content }}{% endif %}{% endfor %}"
    assert "[call]" in text(is_none, CALLS)  # as it was given


def test_text_of_rows_never_becomes_a_mark(both: tuple[Tokenizer, PreTrainedTokenizerFast]) -> None:
    row = ChatRow(read_messages(CALLS, "row").messages, variables={"tools": [{"name": "<|im_end|>"}]})
    ids, _ = encode(TOOLS, both[0], row)
    assert ids.count(both[0].special_tokens["<|im_end|>"]) == len(CALLS) + 1  # the turns', and that of the tools
    with pytest.raises(ValueError, match=r"row\[0\].content holds U\+FDD1|row\[0\] holds U\+FDD1"):
        read_messages([{"role": "user", "content": "a\ufdd1b"}], "row")


def test_variables_and_functions_are_those_of_transformers() -> None:
    source = (
        "{{ tools is none }} {{ documents is none }} {{ {'b': 1, 'a': '<ä>'} | tojson(indent=1, sort_keys=true) }} "
        "{{ [1, 2] | tojson(separators=(',', ':')) }} {{ dict(a=1) }} {% set ns = namespace(x=1) %}{{ ns.x }}"
        "{{ messages[0].content }}{{ messages[1].thinking }}{{ messages[1].reasoning_content }}"
    )
    messages = [TURNS[2], {**TURNS[3], "reasoning": "hm"}]
    (expected,), _ = render_jinja_template([messages], chat_template=source)
    assert text(source, messages, trained=[]) == expected
    assert json.dumps("<ä>", ensure_ascii=False) in expected
