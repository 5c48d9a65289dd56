"""Run directories and the summaries of runs, from files alone."""

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtrain.base.locks import lock
from llmtrain.base.options import option_of_target
from llmtrain.base.run_files import CONFIG, ENVIRONMENT, LOCK, MANIFEST, METRICS, SUMMARY
from llmtrain.base.run_records import read_environment, read_summary
from llmtrain.base.stored_files import COUNT, NUMBER, TEXT, StoredFileError, check_kinds, open_regular, optional
from llmtrain.base.stored_yaml import read_yaml
from llmtrain.config.stored_config import flatten
from llmtrain.metrics import Row, read_metrics, validation_score

DEPTH = 3  # levels below a target that are searched for runs: runs/sweeps/<sweep>/<job>
PLACES = ("name", "output_dir", "run_dir", "plugins")  # keys of a run's name, place and code
# Beginnings of keys that decide what is stored and shown of a run, and nothing about its training.
NOT_TRAINING = ("checkpoint.", "metrics.", "loop.sample_", "runtime.profile", "data.cache_dir")
# Keys of the data that change neither the validation text nor its tokens.
NOT_VALIDATION = ("data.sequence_length", "data.shuffle", "data.cache_dir", "data.balance", "data.pack")


@dataclass(frozen=True)
class RunSummary:
    """The summary of one run, finished or not; None stands for a value that is not known (yet)."""

    path: Path
    name: str
    state: str  # finished, interrupted, failed, running, or pending
    step: int
    max_steps: int | None
    tokens: int
    tokens_per_second: float | None  # over the whole run, training steps only
    train_seconds: float | None
    final_loss: float | None
    best_val_loss: float | None
    best_val_step: int | None
    config: dict[str, Any]  # dotted key -> value
    accuracy: float | None = None  # of the best validation of a classifier; the next three too
    macro_f1: float | None = None
    confusion: Sequence[Sequence[int]] = ()  # rows: true classes, columns: predicted ones
    labels: Sequence[str] = ()
    val_data: str | None = None  # a digest of the validation data; None: not known
    diverged: bool = False  # its last losses are not finite, or higher than before training
    parent: tuple[str, int] | None = None  # of a branch: the name of its parent, and the step after which it begins

    @property
    def is_best_untrained(self) -> bool:
        """True if no validation was better than that before training."""
        return self.best_val_step == 0

    @property
    def lineage(self) -> str:
        """Return the origin of a branch, as in "tiny-k3v9 at step 800"; empty for other runs."""
        return "" if self.parent is None else f"{self.parent[0]} at step {self.parent[1]:,}"


def find_runs(targets: Sequence[Path]) -> list[Path]:
    """Find the run directories that ``targets`` are or contain, at most :data:`DEPTH` levels down.

    Each appears once, in a stable order.  Raises ValueError for a target without a run.
    """
    runs: dict[Path, Path] = {}
    for target in targets:
        if not target.is_dir():
            raise ValueError(f"{target}: no such directory")
        found = list(_runs_within(target, DEPTH))
        if not found:
            hint = " (it is a checkpoint; name its run)" if (target / MANIFEST).exists() else ""
            raise ValueError(
                f"{target}: neither a run nor a sweep{hint}; a run directory holds {CONFIG}, "
                "a sweep directory holds run directories"
            )
        runs |= {run.resolve(): run for run in found}
    return list(dict.fromkeys(runs.values()))


def _runs_within(path: Path, depth: int) -> Iterator[Path]:
    if (path / CONFIG).is_file() and not (path / MANIFEST).exists():
        yield path
    elif depth:
        for child in sorted(path.iterdir()):
            if child.is_dir() and not child.name.startswith("."):
                yield from _runs_within(child, depth - 1)


def summarise(run_dir: Path) -> RunSummary:
    """Read ``config.yaml``, ``summary.json``, ``metrics.jsonl`` and ``environment.json`` of a run, where they exist.

    ``summary.json`` counts only if it is newer than the metrics; a run that continues, or was killed, is read from its
    metrics alone.  The losses always come from the metrics.  Raises ValueError naming a file that cannot be read.
    """
    config = _read_config(run_dir / CONFIG)
    rows = read_metrics(run_dir / METRICS) if (run_dir / METRICS).exists() else []
    end = read_summary(run_dir / SUMMARY)
    trained = [row for row in rows if "loss" in row and "event" not in row]
    validated = [row for row in rows if "val_loss" in row]
    running = is_locked(run_dir)
    # Events do not count: they are written late, and stay when the run rolls back to an earlier step.
    newest = max((row["step"] for row in rows if "event" not in row), default=-1)
    if running or newest > end.get("step", -1):
        end = {}
    state = "running" if running else end.get("exit_reason", "interrupted" if rows else "pending")
    last: Row = trained[-1] if trained else {"step": 0, "tokens": 0, "loss": None}
    best: Row = min(validated, key=validation_score, default={})
    seconds = _train_seconds(trained)
    facts: dict[str, Any] = {
        "name": config.get("name"),
        "step": last["step"],
        "max_steps": config.get("loop.max_steps") if config.get("loop.epochs") is None else None,
        "tokens": last["tokens"],
        "train_seconds": seconds,
        "tokens_per_second": last["tokens"] / seconds if seconds else None,
    } | end
    return RunSummary(
        path=run_dir,
        name=str(facts["name"] or run_dir.name),
        state=state,
        step=facts["step"],
        max_steps=facts["max_steps"],
        tokens=facts["tokens"],
        tokens_per_second=facts["tokens_per_second"],
        train_seconds=facts["train_seconds"],
        final_loss=last["loss"],
        best_val_loss=best.get("val_loss"),
        best_val_step=best.get("step"),
        config=config,
        accuracy=best.get("accuracy"),
        macro_f1=best.get("macro_f1"),
        confusion=best.get("confusion", ()),
        labels=best.get("labels", ()),
        val_data=best.get("val_data"),
        diverged=has_diverged(trained, validated, best),
        parent=_read_parent(run_dir / ENVIRONMENT),
    )


def ranked(runs: Sequence[RunSummary]) -> list[RunSummary]:
    """Sort, best first, by the accuracy of a classifier, then validation loss, then last training loss.

    Unknown and non-finite values come last of those that have learned something; then the runs whose best validation is
    that before training.
    """
    return sorted(
        runs,
        key=lambda run: (
            run.best_val_loss is not None and run.is_best_untrained,
            -(run.accuracy or 0),
            _order(run.best_val_loss),
            _order(run.final_loss),
        ),
    )


def has_diverged(trained: Sequence[Row], validated: Sequence[Row], best: Row) -> bool:
    """Return whether the last losses are not finite, or no better than before training."""
    losses = [rows[-1][key] for rows, key in ((trained, "loss"), (validated, "val_loss")) if rows]
    if any(loss is None or not math.isfinite(loss) for loss in losses):
        return True
    return best.get("step") == 0 and bool(trained) and trained[-1]["loss"] > best["val_loss"]


def by_validation_data(runs: Sequence[RunSummary]) -> list[list[RunSummary]]:
    """Divide ``runs`` into those whose validation losses can be compared: on the same data, in the same tokens.

    Runs without a validation loss are with those of their data, or together at the end.
    """
    validated = [run for run in runs if run.best_val_loss is not None]
    by_digest = all(run.val_data is not None for run in validated)  # older versions did not write it
    groups: dict[str, list[RunSummary]] = {}
    for run in validated:
        groups.setdefault(str(run.val_data) if by_digest else _validation_settings(run), []).append(run)
    rest = []
    for run in runs:
        if run.best_val_loss is None:
            own = _validation_settings(run)
            rest.append(run)
            for group in groups.values():
                if any(_validation_settings(other) == own for other in group):
                    group.append(rest.pop())
                    break
    return [*groups.values(), *([rest] if rest else [])]


def _validation_settings(run: RunSummary) -> str:
    keys = [key for key in run.config if key.startswith(("data.", "tokenizer.")) and key not in NOT_VALIDATION]
    return repr(sorted((key, run.config[key]) for key in keys))


def differences(runs: Sequence[RunSummary]) -> dict[str, list[Any]]:
    """Find the settings of training in which ``runs`` differ: dotted key -> the value of each run.

    Different options of a group appear as one setting, the group's name; keys that only some of its options have are
    left out.
    """
    keys = [key for key in runs[0].config if key not in PLACES and not key.startswith(NOT_TRAINING)]
    keys = [key for key in keys if all(key in run.config for run in runs)]
    result: dict[str, list[Any]] = {}
    for key in keys:
        values = [run.config[key] for run in runs]
        if any(value != values[0] for value in values):
            if key.endswith("._target_"):
                key, values = key.removesuffix("._target_"), [option_of_target(str(value)) for value in values]
            result[key] = values
    return result


def is_locked(run_dir: Path) -> bool:
    """Return whether a process works in the run, holding its lock."""
    try:
        with os.fdopen(open_regular(run_dir / LOCK)) as file:
            lock(file.fileno(), wait=False, shared=True)  # released as the file closes
    except (FileNotFoundError, StoredFileError):
        return False
    except BlockingIOError:
        return True
    return False


def _order(value: float | None) -> float:
    return math.inf if value is None or not math.isfinite(value) else value


def _train_seconds(rows: Sequence[Row]) -> float | None:
    """Sum the time of training steps: each row's tokens over its speed, the mean since the row before."""
    seconds, tokens = 0.0, 0
    for row in rows:
        if row.get("tokens_per_second"):
            seconds += (row["tokens"] - tokens) / row["tokens_per_second"]
        tokens = row["tokens"]
    return seconds or None


def _read_config(path: Path) -> dict[str, Any]:
    values = flatten(read_yaml(path))
    for key, kind in (("name", TEXT), ("loop.max_steps", COUNT), ("loop.epochs", NUMBER)):
        check_kinds(values, {key: optional(kind)}, str(path))
    return values


def _read_parent(path: Path) -> tuple[str, int] | None:
    parent = (read_environment(path) or {}).get("parent")
    if not isinstance(parent, dict) or not COUNT.holds(parent.get("step")) or not TEXT.holds(parent.get("run")):
        return None
    return Path(parent["run"]).name, parent["step"]
