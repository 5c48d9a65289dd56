"""The JSON files that a run leaves, read back with the types of their values checked."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llmtrain.base.stored_files import (
    COUNT,
    FLAG,
    LIST,
    NUMBER,
    OBJECT,
    OBJECTS,
    TEXT,
    TEXTS,
    Kind,
    StoredFileError,
    check_kinds,
    open_regular,
    optional,
    parse_json_object,
    read_json_object,
    read_text_file,
    refuse,
)

MAX_LINE_BYTES = 64 << 20  # of the metrics: a confusion matrix of 2,000 classes takes 12 MB

_SUMMARY = {
    "exit_reason": TEXT, "name": TEXT, "verb": TEXT, "step": COUNT, "tokens": COUNT, "max_steps": optional(COUNT),
    **{key: optional(NUMBER) for key in (
        "train_seconds", "tokens_per_second", "final_loss", "final_train_loss", "final_val_loss", "best_val_loss",
        "best_accuracy", "accuracy", "macro_f1")},
    "best_val_step": optional(COUNT),
}  # fmt: skip

_RESUME = {"time": TEXT, "step": COUNT, "changes": LIST, "command": LIST, "versions": OBJECT, "device": TEXT}
_ENVIRONMENT = {
    "time": TEXT, "command": LIST, "python": TEXT, "platform": TEXT, "versions": OBJECT, "device": TEXT,
    "directory": TEXT, "weights": TEXT, "resumes": OBJECTS,
}  # fmt: skip

_ROW = {
    **{key: optional(NUMBER) for key in (
        "loss", "val_loss", "epoch", "learning_rate", "grad_norm", "grad_max", "tokens_per_second", "mfu",
        "step_seconds", "memory_bytes", "accuracy", "macro_f1", "seconds")},
    "tokens": COUNT, "batch_size": COUNT, "refused": optional(FLAG), "labels": TEXTS,
    "confusion": Kind("a square of whole numbers", lambda value: is_square(value)),
}  # fmt: skip


def is_square(value: Any) -> bool:
    """True for a list of as many lists of whole numbers as each of these has."""
    return type(value) is list and all(
        type(row) is list and len(row) == len(value) and all(COUNT.holds(number) for number in row) for row in value
    )


# --- whole files --------------------------------------------------------------------------------------------------


def read_summary(path: Path) -> dict[str, Any]:
    """``summary.json``; {} if there is none.  Raises :class:`StoredFileError`, naming it, if it cannot be used."""
    if not os.path.lexists(path):
        return {}
    summary = _read(path, "a run's summary (a JSON object)")
    check_kinds(summary, _SUMMARY, str(path))
    return summary


def read_environment(path: Path) -> dict[str, Any] | None:
    """``environment.json``; None if there is none.  Raises :class:`StoredFileError`, naming it."""
    if not os.path.lexists(path):
        return None
    environment = _read(path, "a run's environment (a JSON object)")
    check_kinds(environment, _ENVIRONMENT, str(path))
    for number, resume in enumerate(environment.get("resumes", []), start=1):
        check_kinds(resume, _RESUME, f"{path}, resume {number}")
    for entry in (environment, *environment.get("resumes", [])):
        versions = entry.get("versions", {})
        check_kinds(versions, dict.fromkeys(versions, TEXT), f"{path}, versions")
    return environment


def read_overrides(path: Path) -> list[str]:
    """``overrides.json`` of a sweep's job; [] if there is none.  Raises :class:`StoredFileError`, naming it."""
    if not os.path.lexists(path):
        return []
    try:
        overrides = json.loads(read_text_file(path))
    except (ValueError, RecursionError) as error:
        raise StoredFileError(f"{path}: not JSON ({str(error)[:200]}); restore it, or remove it to continue") from error
    except OSError as error:
        raise StoredFileError(f"{path}: {error.strerror}") from error
    if not TEXTS.holds(overrides):
        refuse(str(path), f"must be {TEXTS.words}")
    return overrides


def _read(path: Path, what: str) -> dict[str, Any]:
    try:
        return read_json_object(path, what)
    except OSError as error:
        raise StoredFileError(f"{path}: {error.strerror}") from error


# --- rows ---------------------------------------------------------------------------------------------------------


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each whole line of a file of rows, and its row; a last line without its newline is left out.

    Raises :class:`StoredFileError`, naming file and line, for a line that is no row of a run.
    """
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            number = 0
            while raw := file.readline(MAX_LINE_BYTES):
                number += 1
                if not raw.endswith(b"\n"):
                    if len(raw) == MAX_LINE_BYTES:
                        raise StoredFileError(f"{path}, line {number}: longer than {MAX_LINE_BYTES:,} bytes")
                    return
                yield _parse_row(raw, f"{path}, line {number}")
    except OSError as error:
        raise StoredFileError(f"{path}: {error.strerror}") from error


def _parse_row(raw: bytes, where: str) -> tuple[str, dict[str, Any]]:
    try:
        line = raw.decode("utf-8")
        row = parse_json_object(line, where, "an object with a step")
    except UnicodeDecodeError as error:
        raise StoredFileError(f"{where}: byte {error.start} is not UTF-8; remove the line to continue") from error
    except StoredFileError as error:
        raise StoredFileError(f"{error}; remove the line to continue") from error
    if not COUNT.holds(row.get("step")):
        raise StoredFileError(f"{where}: not an object with a step; remove the line to continue")
    return line, row


def check_row(row: Mapping[str, Any], where: str) -> None:
    """Raise :class:`StoredFileError`, naming the place, for a row whose values have other types than a run writes."""
    if "event" in row:
        check_kinds(row, {"event": TEXT, "changes": LIST, "message": TEXT}, where)
        return
    check_kinds(row, _ROW, where)
    if ("loss" in row or "val_loss" in row) and "tokens" not in row:
        refuse(where, "has no tokens")
    if len(row.get("labels", ())) != len(row.get("confusion", ())):
        refuse(where, "labels and confusion differ in length")
