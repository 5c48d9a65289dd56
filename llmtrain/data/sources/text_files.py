"""Files of text and of rows with a text, as documents: every file that can be read, and an account of the others."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from llmtrain.base.checks import did_you_mean
from llmtrain.data.sources.documents import (
    BINARY,
    COMPRESSIONS,
    DocumentPiece,
    NotText,
    cut_document,
    read_text,
    sample_text,
    split_documents,
)
from llmtrain.data.sources.files import Stamp, remember, stamp
from llmtrain.data.sources.records import FORMATS, RecordReader, record_suffix
from llmtrain.data.sources.search import EMPTY, NO_ROW, LeftOut, find_files, nothing_found

TEXT_SUFFIXES = (".txt", ".md", ".text")  # of files that are text by their name
TEXT_COLUMNS = ("text", "content")  # names of the column of texts, where the user names none
CONVERSATIONS = ("messages", "conversations", "instruction", "prompt")  # columns of rows for data=instruction
WANTED = "text that can be read"
NAMES = 3  # in a message


class TextFile(NamedTuple):
    """A file to read."""

    path: Path
    column: str | None  # of the rows that it holds; None: it is plain text


@dataclass
class ReadingAccount:
    """Counts of what was not read of the files, for messages to the user."""

    columns: set[str] = field(default_factory=set)  # that were not read
    rows: Counter[str] = field(default_factory=Counter)  # without a text, by file
    files: list[str] = field(default_factory=list)  # without a text
    records: RecordReader = field(default_factory=RecordReader)

    def notes(self) -> list[str]:
        notes = self.records.notes()
        if self.columns:
            notes.append(f"columns that are not read: {_few(sorted(self.columns), 20)}")
        if self.rows:
            notes.append(
                f"{self.rows.total():,} rows without a text (null or empty) are left out: {_few(list(self.rows))}"
            )
        if self.files:
            notes.append(f"{len(self.files):,} files without a text (nothing but white space): {_few(self.files)}")
        return notes


def find_text_files(
    path: str, key: str, column: str | None, memo: Path, left_out: LeftOut, *, verify: bool = False
) -> list[TextFile]:
    """The files that ``path``, the value of ``key``, names and that can be read: as text, or as rows with ``column``.

    A file of a folder that is not text is added to ``left_out``: by all of its bytes if its ending does not tell, which
    ``memo`` remembers, and by samples if it should be text.  Raises ValueError, with the reason, for a file that is
    named itself and cannot be read, and for rows of which the column is not clear.
    """
    found = find_files(path, lambda _: True, WANTED, key, left_out)
    unknown = [file for file in found if not _is_rows(file) and file not in left_out.named]
    by_name = [file for file in unknown if _is_named_text(file)]
    others = sorted(set(unknown).difference(by_name))
    reasons = dict(zip(others, remember(memo, others, _reason_not_text, verify=verify), strict=True))
    samples = memo.with_stem(f"{memo.stem}-samples")
    reasons |= zip(by_name, remember(samples, by_name, _reason_not_text_by_samples, verify=verify), strict=True)
    files = []
    for file in found:
        if file not in left_out.named and not file.stat().st_size:
            left_out.add(EMPTY, file)
        elif _is_rows(file):
            files += _file_of_rows(file, column, left_out)
        elif reason := reasons.get(file):
            left_out.add(reason, file)
        else:
            files.append(TextFile(file, None))
    if not files:
        raise nothing_found(path, WANTED, key, left_out)
    return files


def read_documents(
    files: Sequence[TextFile], stamps: Sequence[Stamp], separator: str, account: ReadingAccount
) -> Iterator[DocumentPiece]:
    """The documents of ``files``: a row is one, and so is a stretch of plain text up to ``separator``.

    Raises ValueError for a file that is not as it was when its stamp was taken.
    """
    for file, before in zip(files, stamps, strict=True):
        has_text = False
        for piece in _read(file, separator, account):
            has_text = True
            yield piece
        if stamp(file.path) != before:
            raise ValueError(f"{file.path}: changed while it was read; start again when it is complete")
        if not has_text:
            account.files.append(str(file.path))


def _read(file: TextFile, separator: str, account: ReadingAccount) -> Iterator[DocumentPiece]:
    name = str(file.path)
    if file.column is None:
        try:
            for piece in split_documents(read_text(file.path), separator, name):
                yield piece._replace(source=name)
        except NotText as error:
            raise ValueError(
                f"{error}; to train on other files without it, remove it, or name them with a glob"
            ) from error
        return
    for record in account.records.read(file.path):
        account.columns.update(record.values)
        account.columns.discard(file.column)
        if record.value(file.column, "data.text_column") is None:
            account.rows[name] += 1
            continue
        text = record.text(file.column, "data.text_column")
        if not text or text.isspace():
            account.rows[name] += 1
        yield from cut_document(text, record.origin, name)


def _file_of_rows(file: Path, column: str | None, left_out: LeftOut) -> list[TextFile]:
    try:
        first = next(RecordReader().read(file), None)
    except ValueError:
        if record_suffix(file) == ".json":  # not a list of objects, so a text like any other
            return [TextFile(file, None)]
        raise
    if first is None:
        left_out.add(NO_ROW, file)
        return []
    if column is not None:
        first.value(column, "data.text_column")
        return [TextFile(file, column)]
    columns = list(first.values)
    candidates = [name for name in columns if name.lower() in TEXT_COLUMNS] or columns
    if len(candidates) == 1 and isinstance(first.values[candidates[0]], str | None):
        return [TextFile(file, candidates[0])]
    listed = _few(columns, 20)
    if candidates == columns and file not in left_out.named:
        left_out.add("rows without a column text or content (data.text_column=NAME names another)", file)
        return []
    remedy = f"name it with data.text_column=NAME{did_you_mean('text', columns)}"
    if any(name in columns for name in CONVERSATIONS):
        remedy += "; conversations and instructions are for data=instruction"
    raise ValueError(f"{first.origin}: which column is the text? There are {listed}; {remedy}")


def _is_rows(file: Path) -> bool:
    return record_suffix(file) in FORMATS


def _is_named_text(file: Path) -> bool:
    name = Path(file.stem) if file.suffix in COMPRESSIONS else file
    return name.suffix.lower() in TEXT_SUFFIXES


def _reason_not_text(file: Path) -> str:
    """The reason why ``file`` is not text, in words that are the same for many files; "" if it is."""
    try:
        for _ in read_text(file):
            pass
    except NotText as error:
        return error.reason
    except ValueError as error:
        return str(error).removeprefix(f"{file}: ")
    return ""


def _reason_not_text_by_samples(file: Path) -> str:
    """The same for a file that is text by its name; "" also if it cannot be read, which is an error."""
    try:
        sample_text(file)
    except NotText as error:
        return f"{error.reason}, though its name says so" if error.reason == BINARY else error.reason
    except ValueError:
        return ""
    return ""


def _few(names: Sequence[str], at_most: int = NAMES) -> str:
    return ", ".join(names[:at_most]) + (f", … ({len(names):,})" if len(names) > at_most else "")
