"""``metrics=tensorboard``: ``metrics.jsonl``, and the same numbers as event files under ``tensorboard/``."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llmtrain.base.run_files import TENSORBOARD as FOLDER
from llmtrain.metrics import Metrics, Row
from llmtrain.metrics.local import Local

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


@dataclass(frozen=True)
class TensorBoard(Local):
    """Settings of ``metrics=tensorboard``; ``tensorboard --logdir RUN`` shows the curves."""

    def check(self) -> None:
        if importlib.util.find_spec("tensorboard") is None:
            raise ValueError(
                "metrics=tensorboard: the tensorboard package is not installed; "
                "pip install 'llmtrain[tensorboard]', or choose metrics=local"
            )

    def build(self, run_dir: Path, *, resume_step: int | None) -> "TensorBoardMetrics":
        """Open both sinks; on resume TensorBoard drops the points after ``resume_step``."""
        self.check()
        return TensorBoardMetrics(super().build(run_dir, resume_step=resume_step), run_dir, resume_step)


class TensorBoardMetrics(Metrics):
    """A sink that writes rows to ``local``, and to TensorBoard as scalars and events as text."""

    def __init__(self, local: Metrics, run_dir: Path, resume_step: int | None) -> None:
        self._local = local
        self._folder = str(run_dir / FOLDER)
        self._writer = self._open(resume_step)

    def _open(self, resume_step: int | None) -> "SummaryWriter":
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(self._folder, purge_step=None if resume_step is None else resume_step + 1)

    def row(self, row: Row) -> None:
        """Record ``row`` in both sinks; scalars are tagged ``train/loss``, ``validation/val_loss`` and so on."""
        self._local.row(row)
        step = row.get("step")
        if "event" in row:
            details = "  \n".join(f"{key}: {value}" for key, value in row.items() if key not in ("event", "step"))
            self._writer.add_text(f"event/{row['event']}", details, step)
        else:
            group = "validation" if "val_loss" in row else "train"
            for key, value in row.items():
                if key != "step" and isinstance(value, int | float):  # a bool too, as 0 or 1
                    self._writer.add_scalar(f"{group}/{key}", value, step)
        self._writer.flush()

    def rewind(self, step: int) -> None:
        self._local.rewind(step)
        self._writer.close()
        self._writer = self._open(step)

    def close(self) -> None:
        self._writer.close()
        self._local.close()
