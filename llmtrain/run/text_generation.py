"""Checks and defaults for generating text with the model of a run."""

from pathlib import Path

from llmtrain.data.chat.template import ChatTemplate
from llmtrain.data.chat.templates import find_template
from llmtrain.run.load import LoadedModel


def check_generates(trained: LoadedModel, target: Path) -> None:
    """Raise ValueError for a model that was not trained to write text."""
    if not trained.run.objective.generates:
        raise ValueError(
            f"{target}: this run was trained to classify texts, not to write them; use llmtrain predict instead"
        )


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
    return find_template(name, trained.tokenizer, system=system)
