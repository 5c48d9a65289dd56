"""Export of a template as Jinja source, so that transformers' ``apply_chat_template`` renders as we do."""

import json
from string import Formatter

from llmtrain.data.chat.markup_template import MarkupTemplate

REFUSED = "this template supports the roles system, user and assistant"


def to_jinja(template: MarkupTemplate, *, begin: str) -> str:
    """The source of ``chat_template.jinja``; ``begin``: the tokens that begin a text, by name.

    An instruction with a separate input cannot be expressed: messages in transformers have no such field.
    """
    trim = " | trim" if template.strips else ""
    first = "messages[0]['content']"
    default = _filled(template.system, json.dumps(template.default_system), trim) if template.default_system else ""
    end = _text(template.end) if template.end else "{{ eos_token }}"
    if not template.end and template.ends_once:
        end = "{% if loop.last and not add_generation_prompt %}{{ eos_token }}{% endif %}"
    after = _text(template.after)
    return "".join(
        [
            _text(begin) if template.begins_text else "",
            "{% if messages and messages[0]['role'] == 'system' %}{% set turns = messages[1:] %}",
            _filled(template.system, first, trim),
            "{% else %}{% set turns = messages %}",
            default,
            "{% endif %}{% for message in turns %}{% if message['role'] == 'assistant' %}",
            _text(template.before + template.lead),
            f"{{{{ message['content']{trim} }}}}",
            end,
            f"{{% if not loop.last or add_generation_prompt %}}{after}{{% endif %}}" if after else "",
            "{% elif message['role'] == 'user' %}",
            _filled(template.user, "message['content']", trim),
            f"{{% else %}}{{{{ raise_exception({json.dumps(REFUSED)}) }}}}{{% endif %}}{{% endfor %}}",
            f"{{% if add_generation_prompt %}}{_text(template.before)}{{% endif %}}" if template.before else "",
        ]
    )


def _filled(form: str, content: str, trim: str) -> str:
    """``form`` with the Jinja expression ``content`` in place of its field."""
    source = ""
    for literal, name, _, _ in Formatter().parse(form):
        source += _text(literal)
        if name and name != "input":
            source += f"{{{{ {content}{trim} }}}}"
    return source


def _text(text: str) -> str:
    """``text`` literally, even if it contains Jinja syntax."""
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if text else ""
