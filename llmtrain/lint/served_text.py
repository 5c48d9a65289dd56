"""Checks that other programs will give the trained model the tokens that it was trained on."""

import importlib.util
from collections.abc import Iterator

from llmtrain.base.options import option_name
from llmtrain.config.exported_text import differences, text_files
from llmtrain.data.instruction import Instruction
from llmtrain.hf.llama import model_type_of
from llmtrain.hf.tokenizer_export import FILE, splits_as_qwen
from llmtrain.lint.case import Case, Finding, error, warning
from llmtrain.model.llama import LlamaConfig
from llmtrain.tokenizer.bpe import BPE
from llmtrain.tokenizer.byte import ByteTokenizer


def served_text(case: Case) -> Iterator[Finding]:
    """A tokenizer or template whose ids transformers cannot give, and a model that it cannot compute.

    Byte-level tokenizers of this program are written for transformers as they are; unless text is split at responses
    too, nothing can differ.
    """
    run, tokenizer = case.run, case.tokenizer
    if case.is_resumed or importlib.util.find_spec("tokenizers") is None:
        return
    is_split = isinstance(run.data, Instruction) and run.data.split_at_responses
    is_own = isinstance(tokenizer, BPE | ByteTokenizer) and not is_split
    if not is_own:
        try:
            contents = text_files(run, tokenizer, run.model.context_length)
        except ValueError as problem:
            yield warning("tokenizer", f"llmtrain export will refuse this run's tokenizer: {problem}")
            return
        for found in differences(run, tokenizer, contents):
            key = "data.split_at_responses=true" if is_split else f"tokenizer={option_name(run.tokenizer)}"
            what = f"{key}: transformers would give the trained model other tokens than it is trained on: {found}"
            if is_split:
                yield warning("data", f"{what}; llmtrain export will refuse this run")
            else:
                yield error("tokenizer", f"{what}; take another data.template")
            return
    yield from _computable(case, is_qwen=not is_own and splits_as_qwen(contents[FILE]))


def _computable(case: Case, *, is_qwen: bool) -> Iterator[Finding]:
    """A model of Qwen 2's kind that transformers computes with Qwen's tokenizer alone."""
    config = case.run.model
    if is_qwen or not isinstance(config, LlamaConfig):
        return
    try:
        model_type_of(config)
    except ValueError:
        return  # with no tokenizer
    try:
        model_type_of(config, has_qwen_tokenizer=False)
    except ValueError as problem:
        yield warning("model", f"llmtrain export will refuse this run: {problem}")
