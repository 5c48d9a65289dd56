"""The metrics of a run: a stream of rows, each a flat dictionary.

Three kinds of rows, distinguished by their keys:

- train, each ``log_every`` steps: step, tokens, epoch, position (of the step's first sequence in the data order; rows
  of older versions lack it), loss, learning_rate, grad_norm, grad_max, clipped, refused, tokens_per_second, mfu,
  step_seconds, memory_bytes, batch_size, loss_scale under fp16, and outer_norm where replicas have exchanged;
  data_seconds, forward_seconds, backward_seconds, optimizer_seconds and other_seconds add up to step_seconds (rows of
  older versions lack them);
- validation: step, tokens, epoch, val_data (a digest of the validation data), val_loss; of text also bits_per_byte; of
  classifiers also accuracy, macro_f1, confusion and labels; rows of older versions lack val_data and bits_per_byte;
- events: event ("save", "refused", "resume", ...), step, and the details of the event.

``step`` is the number of optimizer steps done when the row was written, ``tokens`` the number of tokens trained on.
"""

import math
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from pathlib import Path

from llmtrain.base.options import Option, RunFacts
from llmtrain.metrics.jsonl import Row, drop_rows, read_metrics

__all__ = ["Metrics", "MetricsConfig", "Row", "ValidationScore", "drop_rows", "read_metrics", "validation_score"]

ValidationScore = tuple[float, float]


def validation_score(validation: Row) -> ValidationScore:
    """The score that compares validation rows of a run; the smallest is the best.

    For a classifier it is the accuracy, and the loss among equals: a more confident classifier has a higher loss for
    its mistakes without making more of them.  For other models it is the loss.
    """
    loss = validation["val_loss"]
    return -validation.get("accuracy", 0.0), math.inf if loss is None or not math.isfinite(loss) else loss


class Metrics(AbstractContextManager["Metrics"], ABC):
    """An open sink of rows, and a context manager that closes it."""

    @abstractmethod
    def row(self, row: Row) -> None:
        """Record ``row``.  The row has left the process when this returns, so a later kill does not lose it.

        On a full disk the row waits in memory and is written with the next one.
        """

    @abstractmethod
    def rewind(self, step: int) -> None:
        """Drop the rows after ``step``, except events: the run was rolled back to it and continues from there."""

    @abstractmethod
    def close(self) -> None:
        """Close the sink; a second call does nothing."""

    def __exit__(self, *error: object) -> None:
        self.close()


class MetricsConfig(Option, ABC):
    """Contract of ``metrics=...``."""

    log_every: int  # optimizer steps between two train rows

    @abstractmethod
    def build(self, run_dir: Path, *, resume_step: int | None) -> Metrics:
        """Open the sink of the run in ``run_dir``.

        ``resume_step`` is None for a new run, and the checkpoint's step for a resumed one: rows that the run will write
        again, identically, are dropped.
        """

    def unread(self, run: RunFacts) -> dict[str, str]:
        if self.log_every <= run.steps:
            return {}
        return {"log_every": f"{run.end}, of which the first and the last are logged; metrics.log_every={run.tenth}"}

    def check(self) -> None:
        """Raise ValueError, before a run directory exists, if the option cannot work on this machine."""
