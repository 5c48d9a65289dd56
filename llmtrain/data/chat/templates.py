"""Find the template that ``data.template=…`` or ``template=…`` names."""

from dataclasses import replace

from llmtrain.base.checks import did_you_mean
from llmtrain.data.chat.builtin_templates import TEMPLATES
from llmtrain.data.chat.jinja_template import JinjaTemplate
from llmtrain.data.chat.markup_template import MarkupTemplate, parse_form
from llmtrain.data.chat.template import ChatTemplate
from llmtrain.tokenizer import Tokenizer

OWN = "tokenizer"  # the template that came with the tokenizer
AUTO = "auto"  # the tokenizer's own where it has one, else DEFAULT
DEFAULT = "alpaca"


def resolve(name: str, tokenizer: Tokenizer) -> str:
    """The name of the template that ``auto`` stands for; any other name as it is."""
    if name != AUTO:
        return name
    return DEFAULT if tokenizer.chat_template is None else OWN


def describe(name: str, tokenizer: Tokenizer) -> str:
    """The template ``name`` for the header of a run."""
    match name, resolve(name, tokenizer):
        case "auto", "tokenizer":
            return "the tokenizer's own (data.template=auto)"
        case "auto", found:
            return f"{found} (data.template=auto: the tokenizer has none of its own)"
        case _:
            return repr(name)[1:-1]


def find_template(
    name: str, tokenizer: Tokenizer, *, system: str | None = None, split_at_responses: bool = False
) -> ChatTemplate:
    """Find the template ``name``: a built-in one, the tokenizer's own, auto, or a text with fields like ``{prompt}``.

    ``system``: the system message of a conversation without one; None: the template's default.
    ``split_at_responses``: no token spans the border of a response, so a space before it need not belong to it.
    Raises ValueError, listing the known ones, for an unknown name or field, or for a tokenizer without a template.
    """
    name = resolve(name, tokenizer)
    if name == OWN:
        return JinjaTemplate.of(tokenizer, system)
    template = parse_template(name)
    if not split_at_responses:
        template = with_spaces_in_response(begun_once(template, tokenizer))
    if system is not None:
        return replace(template, default_system=system, default_with_input=system)
    return template


def begun_once(template: MarkupTemplate, tokenizer: Tokenizer) -> MarkupTemplate:
    """``template`` without the token that begins a text, if it spells that out itself."""
    first = tokenizer.begin_names
    is_doubled = bool(first) and template.begins_text and template.user.startswith(first)
    return replace(template, begins_text=False) if is_doubled else template


def with_spaces_in_response(template: MarkupTemplate) -> MarkupTemplate:
    """``template`` with the spaces before a response as its beginning.

    Most tokenizers make one token of a space and the word after it.  A prompt that ends in a space has to be continued
    without it, by tokens that no text has.
    """
    before = template.before.rstrip(" ")
    return replace(template, before=before, lead=template.before[len(before) :] + template.lead)


def parse_template(name: str) -> MarkupTemplate:
    """A built-in template, or one that the user wrote.  Raises ValueError as :func:`find_template` does."""
    if name in TEMPLATES:
        return TEMPLATES[name]
    if "{" in name:
        return parse_form(name)
    names = [AUTO, *TEMPLATES, OWN]
    raise ValueError(
        f"template={name}: there is no such template{did_you_mean(name, names)}; there are {', '.join(names)}, and a "
        "text of your own with fields, such as 'Q: {prompt} A: {response}'"
    )
