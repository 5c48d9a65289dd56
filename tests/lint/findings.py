"""Looking for findings in runs of any size."""

import dataclasses
from collections.abc import Callable

import torch

from llmtrain import Run
from llmtrain.config.assemble import Parts, assemble, outline
from llmtrain.data.sequences import Sequences
from llmtrain.lint import Case, Finding, lint

QUIET = ("model=tiny", "tokenizer=byte", "loop.max_steps=200")  # less than an epoch


def parts_of(run: Run) -> Parts:
    return assemble(run, torch.device("cpu"), from_start=False)  # what there is to load is not there


def find(*overrides: str, change: Callable[[Parts], Parts] = lambda parts: parts) -> dict[str, Finding]:
    """The findings of a small run by key; ``change`` has a hand in its parts."""
    run = Run.compose(*QUIET, *overrides)
    return {finding.key: finding for finding in lint(Case.of(run, change(parts_of(run)), run.overrides))}


def with_corpus(**changes: Sequences | None) -> Callable[[Parts], Parts]:
    """Other data."""
    return lambda parts: dataclasses.replace(parts, corpus=dataclasses.replace(parts.corpus, **changes))


def find_in(*overrides: str, device: str = "cpu") -> dict[str, Finding]:
    """The findings of a run of any size by key: nothing of the model is allocated, nor anything on ``device``."""
    run = Run.compose(*overrides)
    tokenizer = run.tokenizer.build()
    corpus = run.data.build(tokenizer)
    unit = outline(run, run.vocab_size(tokenizer), corpus.labels)
    length = run.length(corpus.train)
    optimizer = run.optimizer.build(unit)
    case = Case(run, tokenizer, corpus, unit, length, torch.device(device), optimizer, run.overrides)
    return {finding.key: finding for finding in lint(case)}
