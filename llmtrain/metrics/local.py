"""``metrics=local``: rows in ``RUN/metrics.jsonl``."""

from dataclasses import dataclass
from pathlib import Path

from llmtrain.base.files import AppendedFile
from llmtrain.base.run_files import METRICS
from llmtrain.metrics import Metrics, MetricsConfig
from llmtrain.metrics.jsonl import Row, drop_rows, to_line


@dataclass(frozen=True)
class Local(MetricsConfig):
    """Settings of ``metrics=local``."""

    log_every: int

    def __post_init__(self) -> None:
        if self.log_every < 1:
            raise ValueError(f"log_every={self.log_every}: must be 1 or more steps")

    def build(self, run_dir: Path, *, resume_step: int | None) -> Metrics:
        path = run_dir / METRICS
        if resume_step is not None:
            drop_rows(path, lambda row: _is_written_again(row, resume_step))
        return LocalMetrics(path, new=resume_step is None)


class LocalMetrics(Metrics):
    """A sink that appends rows to a file."""

    def __init__(self, path: Path, *, new: bool) -> None:
        if new:
            path.open("x").close()
        self._path = path
        self._file = AppendedFile(path)

    def row(self, row: Row) -> None:
        self._file.append(to_line(row))

    def rewind(self, step: int) -> None:
        """Drop the rows after ``step`` that the run will write again."""
        self._file.rewrite(lambda: drop_rows(self._path, lambda row: _is_written_again(row, step)))

    def close(self) -> None:
        self._file.close()


def _is_written_again(row: Row, resume_step: int) -> bool:
    """Return whether a run resumed from ``resume_step`` writes ``row`` again.

    Events are kept: a save or a refused step happened, whatever is undone.
    """
    return "event" not in row and row["step"] > resume_step
