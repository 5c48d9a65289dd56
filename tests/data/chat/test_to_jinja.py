"""Every template beside what transformers makes of its Jinja source."""

from itertools import product

import pytest
import transformers
from tokenizers import Tokenizer as Library

from llmtrain.data.chat.builtin_templates import TEMPLATES
from llmtrain.data.chat.markup_template import MarkupTemplate
from llmtrain.data.chat.template import Message, PartKind
from llmtrain.data.chat.templates import parse_template
from llmtrain.data.chat.to_jinja import to_jinja
from llmtrain.hf.tokenizer_export import tokenizer_json
from llmtrain.tokenizer.byte import Byte

OWN = 'Q: {prompt}\n"A" {{% x %}} {{{{ y }}}}: {response}\n'  # with what would mean something to Jinja
CONVERSATIONS = [
    [("user", "Hi!  ")],
    [("user", "Hi!"), ("assistant", " Hello, {{ you }}. ")],
    [("system", "Be brief."), ("user", "Hi!"), ("assistant", "Hello."), ("user", "'é' \\n?"), ("assistant", "Yes.")],
    [("user", "a"), ("assistant", "b"), ("user", "c")],
]


def rendered(template: MarkupTemplate, messages: list[tuple[str, str]], add_generation_prompt: bool, bos: str) -> str:
    parts = template.render([Message(*each) for each in messages], add_generation_prompt=add_generation_prompt)
    marks = {PartKind.begin: bos, PartKind.end: "</s>"}
    return "".join(marks.get(part.kind, part.text) for part in parts)


@pytest.mark.parametrize("name", [*TEMPLATES, OWN])
@pytest.mark.parametrize("bos", ["<s>", ""])
def test_a_template_written_as_jinja_renders_the_same_text(name: str, bos: str) -> None:
    template = parse_template(name)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Library.from_str(tokenizer_json(Byte().build())), eos_token="</s>", bos_token=bos or None
    )
    tokenizer.chat_template = to_jinja(template, begin=bos)
    for messages, goes_on in product(CONVERSATIONS, (False, True)):
        rows = [{"role": role, "content": content} for role, content in messages]
        text = tokenizer.apply_chat_template(rows, tokenize=False, add_generation_prompt=goes_on)
        assert text == rendered(template, messages, goes_on, bos), (messages, goes_on)
    with pytest.raises(Exception, match="supports the roles"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)
