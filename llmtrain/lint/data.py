"""Checks of the data that training and evaluation will read."""

import math
from collections.abc import Iterator

import numpy as np

from llmtrain.base.format import percent
from llmtrain.base.options import option_name
from llmtrain.data import IGNORE
from llmtrain.data.sequences import Sequences
from llmtrain.lint.case import Case, Finding, error, warning
from llmtrain.lint.overlap import spread
from llmtrain.weights.scratch import Scratch

SAMPLE_SEQUENCES = 256  # of the first batches, and as many of the rest
SAMPLE_TOKENS = 1 << 19  # the same in tokens, where sequences are long
EMPTY_SHARE = 0.1  # the share of sequences without a target from which on the user is warned
EPOCHS = 4  # repeated data help less and less beyond these: Muennighoff et al. 2023, https://arxiv.org/abs/2305.16264


def masked_targets(case: Case) -> Iterator[Finding]:
    """Sequences whose targets are all masked, which have no loss."""
    data, corpus = case.run.data, case.corpus
    key, name = "data", f"data={option_name(data)}"
    remedy = (
        "make the tokens that are to be predicted targets; if sequences are cut off before them, raise "
        f"data.sequence_length={data.sequence_length}"
    )
    visits = sample(case.sequences, data.sequence_length)
    counts = count_targets(corpus.train, corpus.train.order(visits, case.run.runtime.seed, data.shuffle))
    if not counts.any():
        yield error(
            key,
            f"{name}: every target of the {len(counts):,} training sequences looked at is masked ({IGNORE}): the loss "
            f"would be 0.0 and nothing would be learnt; {remedy}",
        )
    elif (share := float((counts == 0).mean())) > EMPTY_SHARE:
        yield warning(
            key,
            f"{name}: {percent(share)} of the {len(counts):,} training sequences looked at have no target (all are "
            f"masked, {IGNORE}): they take time and teach nothing; {remedy}, or leave such sequences out",
        )
    if corpus.validation is None or not case.evaluates:
        return
    batches = case.run.loop.eval_batches
    evaluated = len(corpus.validation)
    if batches is not None:
        evaluated = min(evaluated, batches * case.run.accumulation.batch_size_at(0, 0))
    counts = count_targets(corpus.validation, sample(evaluated, data.sequence_length))
    if not counts.any():
        yield error(
            key,
            f"{name}: every target of the {len(counts):,} validation sequences looked at is masked ({IGNORE}): the "
            f"validation loss would be 0.0 from the start and always the best; {remedy}, or train "
            "without evaluation: loop.eval_every=0",
        )


def sample(number: int, sequence_length: int) -> np.ndarray:
    """Positions among ``number`` sequences: the first ones, and others spread over the rest."""
    most = max(1, min(SAMPLE_SEQUENCES, SAMPLE_TOKENS // sequence_length))
    return np.unique(np.concatenate([np.arange(min(most, number)), spread(number, most)]))


def count_targets(sequences: Sequences, indices: np.ndarray) -> np.ndarray:
    """The number of targets that are not masked, of each of the sequences ``indices``."""
    return (sequences.gather(indices).targets != IGNORE).sum(axis=1)


def repetition(case: Case) -> Iterator[Finding]:
    """More epochs than help, unless the user has asked for them with ``loop.epochs``."""
    loop = case.run.loop
    if case.epochs <= EPOCHS or loop.epochs is not None or case.is_resumed:
        return
    enough = max(1, int(case.max_steps * EPOCHS / case.epochs))
    yield warning(
        "loop.max_steps",
        f"loop.max_steps={loop.max_steps}: goes {case.epochs:.3g} times through {case.corpus.train.tokens:,} "
        f"training tokens: beyond {EPOCHS} epochs repeated text helps less and less, and is memorised; more "
        f"text, loop.max_steps={enough}, or, if it is meant, loop.max_steps=null loop.epochs={math.ceil(case.epochs)}",
    )


def batch_beyond_data(case: Case) -> Iterator[Finding]:
    """An optimizer step that has a sequence more than once."""
    sequences, batch = len(case.corpus.train), case.largest_batch
    if batch > sequences:
        key = case.batch_key
        yield warning(
            key,
            f"{key}: a step of {batch} sequences has some of them more than once, since there are {sequences:,} for "
            f"training; {max(1, sequences // 8)} sequences a step, shorter ones "
            f"(data.sequence_length={case.run.data.sequence_length}), or more text",
        )


def untrained_positions(case: Case) -> Iterator[Finding]:
    """Positions of the context that are in no training sequence, and that ``generate`` would use."""
    length, context = case.run.data.sequence_length, case.run.model.context_length
    if 2 * length < context and isinstance(case.run.weights, Scratch):
        yield warning(
            "model.context_length",
            f"model.context_length={context}: training sequences have data.sequence_length={length}, so positions "
            f"from {length} on are never trained, and text generated beyond them is noise; "
            f"model.context_length={length}, or longer sequences",
        )


def unused_vocabulary(case: Case) -> Iterator[Finding]:
    """Rows of the embedding for ids that the tokenizer does not have."""
    rows, ids = case.run.model.vocab_size, case.tokenizer.vocab_size
    if rows is not None and rows > 1.1 * ids + 64 and isinstance(case.run.weights, Scratch):
        yield warning(
            "model.vocab_size",
            f"model.vocab_size={rows}: the tokenizer has {ids:,} ids; the other {rows - ids:,} rows of the "
            "embedding take memory and time for tokens that never occur; model.vocab_size=null",
        )
