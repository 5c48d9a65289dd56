"""Read the rows of a Parquet file, a few at a time."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtrain.base.checks import needing_package

if TYPE_CHECKING:
    from pyarrow import RecordBatch
    from pyarrow.parquet import FileMetaData

BATCH_ROWS = 32  # in memory at once
SUSPICIOUS_BYTES = 1 << 28  # of a column in a row group, from which on its compression is looked at
SUSPICIOUS_RATIO = 100  # text is compressed to a tenth of its size, seldom to a thirtieth


def read_parquet(path: Path, longest: int) -> Iterator[dict[str, Any]]:
    """Yield the rows of ``path``.

    Raises ValueError, naming the file, if it is missing or damaged, for a cell of more than ``longest`` bytes, and for
    columns that are compressed so much that they can hold nothing else.
    """
    with needing_package(f'{path}: needs pyarrow; pip install "llmtrain[parquet]"'):
        import pyarrow
        from pyarrow import parquet
    number = 0
    try:
        # Pages are read one after the other, not whole row groups, which may be gigabytes.
        with parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
            _check_sizes(path, file.metadata, longest)
            for batch in file.iter_batches(BATCH_ROWS, use_threads=False):
                _check_cells(path, batch, number, longest)
                yield from batch.to_pylist()
                number += batch.num_rows
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from error
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: not a Parquet file, or damaged or cut: {error}") from error


def _check_sizes(path: Path, metadata: "FileMetaData", longest: int) -> None:
    for group in range(metadata.num_row_groups):
        for column in range(metadata.num_columns):
            chunk = metadata.row_group(group).column(column)
            size, compressed = chunk.total_uncompressed_size, max(chunk.total_compressed_size, 1)
            if size > SUSPICIOUS_BYTES and size > SUSPICIOUS_RATIO * compressed:
                raise ValueError(
                    f"{path}: column {chunk.path_in_schema}: {compressed:,} bytes stand for {size:,}, which is no "
                    f"text; write the file with smaller row groups, or leave the column out"
                )
            if size > longest * max(chunk.num_values, 1):
                raise _too_long(path, chunk.path_in_schema, longest)


def _check_cells(path: Path, batch: "RecordBatch", number: int, longest: int) -> None:
    """Raise ValueError for a cell that is too long, before it is copied into Python's memory."""
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        if column.nbytes > longest and max(column.slice(row, 1).nbytes for row in range(len(column))) > longest:
            raise _too_long(path, f"{name} in rows {number + 1} to {number + batch.num_rows}", longest)


def _too_long(path: Path, name: str, longest: int) -> ValueError:
    return ValueError(
        f"{path}: column {name}: a cell has more than {longest:,} bytes, the most that a record may have; split it, or "
        "save a text of this length as a .txt file, which may be of any size"
    )
