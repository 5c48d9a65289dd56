"""Check an export: transformers' tokenizer must make the ids of training of the same text."""

from pathlib import Path
from typing import Any

from llmtrain.config.exported_text import TURNS, describe_difference, expected_ids
from llmtrain.data.labelled import LabelledText
from llmtrain.run.load import LoadedModel
from llmtrain.verify.logits import ExportMismatch, quiet_loading


def check_texts(folder: Path, trained: LoadedModel) -> str:
    """Compare ids of texts, and of conversations where the run has a template; return the result in words.

    Raises :class:`ExportMismatch`, naming the first tokens that differ.
    """
    with quiet_loading():
        import transformers

        theirs: Any = transformers.AutoTokenizer.from_pretrained(str(folder))
        has_conversations, is_classified = False, isinstance(trained.run.data, LabelledText)  # whose data cut texts off
        for expected in expected_ids(trained.run, trained.tokenizer):
            if expected.messages:
                has_conversations = True
                found = theirs.apply_chat_template(
                    expected.messages, add_generation_prompt=expected.asks, return_dict=True
                )["input_ids"]
            else:
                found = theirs(expected.text, truncation=is_classified)["input_ids"]
            if found != expected.ids:
                said = describe_difference(expected.ids, found, trained.tokenizer)
                raise ExportMismatch(f"{expected.what} becomes other tokens in transformers: {said}")
    what = f"texts, and conversations of 1 to {len(TURNS)} turns," if has_conversations else "texts"
    return f"loaded by transformers: {what} have the tokens of training"
