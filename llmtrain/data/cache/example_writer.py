"""Second pass over files of records: encode the examples on threads, and write them into an entry of the cache."""

import logging
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from llmtrain.base.format import percent
from llmtrain.data import DataError
from llmtrain.data.cache.document_encoder import dtype_of
from llmtrain.data.cache.example_cache import FORMAT, ExampleIndex, digest_of
from llmtrain.data.cache.example_plan import (
    LEFT_OUT,
    TRAIN,
    VALIDATION,
    ExampleFiles,
    ExamplePlan,
    count_notes,
    plan_examples,
)
from llmtrain.data.cache.parallel_map import map_in_order
from llmtrain.data.cache.shard_index import ShardWriter
from llmtrain.data.cache.token_cache import REPORT_SECONDS
from llmtrain.data.example_format import EncodedExample, ExampleFormat
from llmtrain.data.examples import no_target
from llmtrain.data.sources.records import Record, RecordReader
from llmtrain.tokenizer import Tokenizer

log = logging.getLogger(__name__)
T = TypeVar("T")
JOB = 128  # records that are encoded together


@dataclass
class ExampleCounts:
    """Examples of one purpose."""

    read: int = 0
    cut: int = 0
    dropped: int = 0


def write_examples(folder: Path, data: ExampleFormat[Any], files: ExampleFiles, tokenizer: Tokenizer) -> None:
    """Write all files of a cache entry into ``folder``.

    Raises ValueError, naming file and line, for a record that is no example, or where no training example is left;
    :class:`DataError` for one that cannot be tokenised.
    """
    plan = plan_examples(data, files)
    dtype = dtype_of(tokenizer.vocab_size + 1)  # one id more stands for a target that is ignored
    tokens = [ShardWriter(folder, name) for name in ("train", "validation")]
    numbers = [ShardWriter(folder, f"{name}-examples") for name in ("train", "validation")]
    counts = [ExampleCounts(), ExampleCounts()]
    remarks: Counter[str] = Counter()
    has_targets, is_new = False, plan.is_new
    for purpose, label, encoded in _encode(data, files, tokenizer, plan):
        remarks.update(encoded.remarks)
        is_new |= encoded.is_new
        counts[purpose].read += 1
        if not len(encoded.inputs):
            counts[purpose].dropped += 1
            continue
        counts[purpose].cut += encoded.is_cut
        tokens[purpose].write(encoded.inputs.astype(dtype), 1)
        if encoded.targets is not None:
            has_targets = True
            targets = np.where(encoded.targets < 0, no_target(dtype), encoded.targets)
            tokens[purpose].write(targets.astype(dtype), 0)
        numbers[purpose].write(np.array([len(encoded.inputs), label], "<i8"), 1)
    if counts[TRAIN].read == counts[TRAIN].dropped:
        raise ValueError(
            f"data.sequence_length={data.sequence_length}: of all {counts[TRAIN].read:,} {data.noun}s for training "
            f"{data.dropped_remark}; raise it"
        )
    written = counts[TRAIN].read + counts[VALIDATION].read
    notes = plan.notes + count_notes(remarks, written, data.noun) + _limit_notes(data, counts)
    train, validation, train_examples, validation_examples = (writer.close() for writer in tokens + numbers)
    ExampleIndex(
        FORMAT, dtype.str, tokenizer.fingerprint, train, validation, train_examples, validation_examples,
        has_targets, plan.names, notes, is_new, digest_of(has_targets, plan.names, notes, is_new),
    ).write(folder)  # fmt: skip


def _limit_notes(data: ExampleFormat[Any], counts: list[ExampleCounts]) -> list[str]:
    """Notes on examples that were cut or dropped because they are longer than the limit."""
    notes = []
    for name, count in (("training", counts[TRAIN]), ("validation", counts[VALIDATION])):
        for number, remark in (
            (count.cut, data.cut_remark),
            (count.dropped, f"{data.dropped_remark}, so they are left out"),
        ):
            if number:
                notes.append(
                    f"{number:,} of {count.read:,} {name} {data.noun}s ({percent(number / count.read)}) are longer "
                    f"than data.sequence_length={data.sequence_length}: {remark}"
                )
    return notes


def _encode(
    data: ExampleFormat[Any], files: ExampleFiles, tokenizer: Tokenizer, plan: ExamplePlan
) -> Iterator[tuple[int, int, EncodedExample]]:
    """Yield purpose, label and ids of the examples that are not left out, in order."""
    encode = data.encoder(tokenizer)

    def encode_job(job: list[tuple[int, int, Record]]) -> list[tuple[int, int, EncodedExample]]:
        done = []
        for purpose, label, record in job:
            try:
                done.append((purpose, label, encode(data.read(record).value)))
            except ValueError as error:
                where = "" if str(error).startswith(record.origin) else f"{record.origin}: "
                raise ValueError(f"{where}{error}") from error
            except BaseException as error:  # a native tokenizer may raise something other than an Exception
                what = f"{type(error).__name__}: {error}".rstrip(": ")
                raise DataError(f"{record.origin} cannot be encoded: {what}") from error
        return done

    planned = zip(plan.purposes.tolist(), plan.labels.tolist(), files.records(RecordReader()), strict=True)
    wanted = ((purpose, label, record) for purpose, label, (_, record) in planned if purpose != LEFT_OUT)
    number, reported = 0, time.monotonic()
    for done in map_in_order(encode_job, iter(lambda: list(islice(wanted, JOB)), [])):
        yield from done
        number += len(done)
        if time.monotonic() - reported > REPORT_SECONDS:
            log.info("tokenising %s: %s of %s", data.path, f"{number:,}", f"{len(plan.purposes):,}")
            reported = time.monotonic()
