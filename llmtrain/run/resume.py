"""Resuming a run, or branching from it: planned first, then applied.

Planning writes nothing, so a refused resume leaves the run untouched.
"""

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llmtrain.base.files import write_atomically
from llmtrain.base.process import cache_folder
from llmtrain.base.run_files import STATE
from llmtrain.base.stored_files import open_regular
from llmtrain.base.tensor_files import CheckpointError
from llmtrain.base.world import ALONE, World
from llmtrain.checkpoint.directory import step_of
from llmtrain.checkpoint.format import copy_checkpoint, verify_checkpoint
from llmtrain.checkpoint.restore import newest_intact
from llmtrain.config import stored_config
from llmtrain.config.assemble import Parts, check_data
from llmtrain.config.run_config import RunConfig
from llmtrain.lint import Case, Finding, lint, lint_changes
from llmtrain.metrics import Row, drop_rows, read_metrics
from llmtrain.run.changes import (
    Change,
    changes,
    check_changes,
    check_length,
    rates,
    since_older_version,
)
from llmtrain.run.directory import RunDirectory
from llmtrain.run.environment import difference_of_machine
from llmtrain.run.stored_run import StoredRun
from llmtrain.run.tokenizer_copy import write_copy
from llmtrain.tokenizer import Tokenizer, TokenizerConfig
from llmtrain.train.state import TrainState, restore_state

# Options of an optimizer that do not change the form of its state.
STATELESS = ("optimizer.lr", "optimizer.weight_decay", "optimizer.layer_decay")


# --- the origin --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Origin:
    """The checkpoint that a run is resumed from."""

    directory: RunDirectory
    checkpoint: Path | None  # None: nothing has been saved yet
    passed_over: tuple[tuple[Path, str], ...] = ()  # damaged newer checkpoints, each with its error

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return 0 if self.checkpoint is None else step_of(self.checkpoint)


def find_origin(directory: RunDirectory, step: int | None = None) -> Origin:
    """The checkpoint of ``step``; without one the newest that is intact.  Compares it with its manifest.

    Raises :class:`CheckpointError` if the named one is damaged, or all are, and ValueError if the step has none.
    """
    checkpoints = directory.find_checkpoints()
    if step is not None:
        named = next((path for path in checkpoints if step_of(path) == step), None)
        if named is None:
            steps = ", ".join(str(step_of(path)) for path in checkpoints)
            kept = " (checkpoint.keep_last and keep_every decide which are kept)"
            there_is = f"it has those of the steps {steps}{kept}" if steps else "it has none yet"
            raise ValueError(f"step={step}: {directory.path} has no checkpoint of this step; {there_is}")
        verify_checkpoint(named)
        return Origin(directory, named)
    if not checkpoints and (lost := last_saved(directory)) is not None:
        raise CheckpointError(
            f"{directory.checkpoints}: there is no checkpoint, though one was saved at step {lost}: they were removed, "
            "or not copied along; restore them, or start a new run"
        )
    path, errors = newest_intact(checkpoints)
    if checkpoints and path is None:
        damage = "; ".join(map(str, errors))
        raise CheckpointError(
            f"{directory.path}: no checkpoint to continue from, all are damaged: {damage}. Nothing was changed; "
            "restore one of them, or start a new run"
        )
    newer = sorted((other for other in checkpoints if path is not None and other > path), reverse=True)
    passed_over = tuple((other, str(error)) for other, error in zip(newer, errors, strict=True))
    return Origin(directory, path, passed_over)


def agreed_origin(world: World, directory: RunDirectory, step: int | None) -> Origin:
    """:func:`find_origin`, which reads all of a checkpoint, by rank 0 for all ranks."""

    def find() -> tuple[str | None, list[tuple[str, str]]]:
        origin = find_origin(directory, step)
        path = None if origin.checkpoint is None else str(origin.checkpoint)
        return path, [(str(damaged), message) for damaged, message in origin.passed_over]

    path, passed_over = world.first(find)
    damaged = tuple((Path(each), message) for each, message in passed_over)
    return Origin(directory, None if path is None else Path(path), damaged)


def last_saved(directory: RunDirectory) -> int | None:
    """The last step whose checkpoint the metrics record; None if they record none."""
    rows = read_metrics(directory.metrics) if directory.metrics.exists() else []
    return max((row["step"] for row in rows if row.get("event") == "save"), default=None)


@dataclass(frozen=True)
class EarlierResults:
    """Results of a run up to its checkpoint, which is written before evaluation and samples."""

    validations: Sequence[Row]
    sampled_step: int | None  # the last one with a sample
    loss: float | None  # of the last step that was logged

    @classmethod
    def read(cls, directory: RunDirectory, step: int) -> "EarlierResults":
        """Read the metrics and samples up to ``step``.  Raises ValueError naming the file and line that is damaged."""
        paths = (directory.metrics, directory.samples)
        rows, samples = (read_metrics(path) if path.exists() else [] for path in paths)
        rows = [row for row in rows if "event" not in row and row["step"] <= step]
        losses = [row["loss"] for row in rows if "loss" in row]
        return cls(
            [row for row in rows if "val_loss" in row],
            max((row["step"] for row in samples if row["step"] <= step), default=None),
            losses[-1] if losses else None,
        )


# --- the plan ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Carryover:
    """The part of a checkpoint's state that the present settings still use."""

    reset: tuple[str, str] | None = None  # the old and the new optimizer by name, where they differ
    optimizer_changes: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)  # that decide the form of the state
    dropped: frozenset[str] = frozenset()  # entries of the state without a meaning under the new settings

    @classmethod
    def between(cls, before: Mapping[str, Any], run: RunConfig) -> "Carryover":
        """Compare ``before``, the completed config of the checkpoint, with ``run``."""
        changed = {key: (old, new) for key, old, new in changes(before, run)}
        reset = changed.get("optimizer._target_")
        options = {key: pair for key, pair in changed.items() if key.startswith("optimizer.") and key not in STATELESS}
        dropped = set()
        if "recovery._target_" in changed:
            dropped.add("recovery")
        of_batch = {key for key in changed if key.startswith("accumulation.")}
        if of_batch - {"accumulation.batch_size"} or (of_batch and run.accumulation.is_probed):
            dropped.add("micro_batch_size")
        if "precision.initial_scale" in changed:
            dropped.add("scaler")
        names = None if reset is None else (_class_name(reset[0]), _class_name(reset[1]))
        return cls(names, options, frozenset(dropped))

    def restore(self, checkpoint: Path, parts: Parts, run: RunConfig) -> TrainState:
        """Bring ``parts`` and every random number generator to where they were at ``checkpoint``, known to be intact.

        Returns the state, which the recovery of ``run`` can load, without the dropped entries.

        Raises :class:`CheckpointError` naming the file, and ValueError
        naming the optimizer's options that do not fit its state.
        """
        try:
            state = restore_state(
                checkpoint, parts.unit, parts.optimizer, fresh_optimizer=self.reset is not None,
                weights=parts.parallel.held(), places=parts.places,
            )  # fmt: skip
            parts.parallel.use_loaded()
        except CheckpointError as error:
            if self.reset is not None or not self.optimizer_changes:
                raise
            pairs = self.optimizer_changes.items()
            now, kept = (", ".join(f"{key}={pair[i]}" for key, pair in pairs) for i in (1, 0))
            raise ValueError(
                f"{now}: needs other optimizer state than was saved ({error}); keep {kept}; or take an optimizer of "
                "another kind, whose state starts afresh; or start a new run from the weights: weights=checkpoint "
                f"weights.path={checkpoint}"
            ) from error
        fresh = TrainState()
        for entry in self.dropped:
            setattr(state, entry, getattr(fresh, entry))
        try:
            parts.precision.load_state_dict(state.scaler)
            run.recovery.build(parts.device).load_state_dict(state.recovery)
            state.restore_rng(parts.device)
        except (ValueError, TypeError, LookupError, ArithmeticError, RuntimeError) as error:
            raise CheckpointError(f"{checkpoint / STATE}: {error}") from error
        return state


@dataclass(frozen=True)
class ResumePlan:
    """The plan of a resume, complete before anything is written."""

    origin: Origin
    parent: RunDirectory | None  # the run that a branch starts from; None: no branch
    before: RunConfig  # as stored
    changes: Sequence[Change]
    carryover: "Carryover"
    results: EarlierResults
    learning_rate: tuple[float, float] | None = None  # of the next step, as stored and now, where it differs
    findings: Sequence[Finding] = ()  # of the linter, about the changes
    notes: Mapping[str, str] = field(default_factory=dict)  # messages by the name of their event

    def checked(self, run: RunConfig, parts: Parts, state: TrainState, overrides: Sequence[str]) -> "ResumePlan":
        """Complete the plan from the assembled parts.  Raises ValueError for what cannot continue."""
        before, origin = self.before, self.origin
        check_data(run, state, parts)
        length = before.length(parts.corpus.train, short=state.short_sequences)
        steps = length.max_steps
        kept = [step_of(path) for path in origin.directory.find_checkpoints()]
        check_length(before, run, length, parts.length, state, kept)
        findings: list[Finding] = []
        if not origin.directory.environment.exists():  # the first start of a sweep's job is a resume too
            findings = lint(Case.of(run, parts, origin.directory.read_overrides()))
        elif self.changes:
            after = Case.of(run, parts, overrides)
            findings = lint_changes(replace(after, run=before, length=length), after)
        learning_rate = rates(before, steps, run, parts.max_steps, state.step)
        return replace(self, findings=findings, learning_rate=learning_rate)

    def on_machine(self, environment: Mapping[str, Any] | None, now: Mapping[str, Any]) -> "ResumePlan":
        """Note where the machine is another than that of the run's last start, so that bits may differ."""
        reason = difference_of_machine(environment, now)
        if reason is None or self.origin.checkpoint is None:
            return self
        message = f"{reason}: from here on the numbers are not bit for bit those that it would have had there"
        return replace(self, notes={**self.notes, "machine": message})

    @property
    def source(self) -> str | None:
        """The checkpoint's path, relative for the run's own and absolute for a parent's; None: from the start."""
        checkpoint = self.origin.checkpoint
        if checkpoint is None or self.parent is not None:
            return None if checkpoint is None else str(checkpoint.resolve())
        return str(checkpoint.relative_to(self.origin.directory.path))

    def events(self) -> Iterator[Row]:
        """Rows for the metrics and the display."""
        step = self.origin.step
        for _, message in self.origin.passed_over:
            yield {"event": "damaged", "step": step, "message": f"{message}; passed over"}
        for event, message in self.notes.items():
            yield {"event": event, "step": step, "message": message}
        if self.origin.checkpoint is not None or self.changes:
            row = {"event": "resume", "step": step, "from": self.source, "changes": [list(row) for row in self.changes]}
            yield row | ({} if self.learning_rate is None else {"rates": list(self.learning_rate)})
        if self.carryover.reset is not None:
            old, new = self.carryover.reset
            message = f"the saved state is {old}'s; {new} starts with a new state"
            yield {"event": "optimizer_reset", "step": step, "message": message}

    def history(self, environment: dict[str, Any] | None, now: dict[str, Any]) -> dict[str, Any]:
        """``environment.json``, given the one there is and the facts of ``now``, with one more entry of ``resumes``."""
        entry = {
            "time": now["time"],
            "step": self.origin.step,
            "from": self.source,
            "changes": [list(row) for row in self.changes],
            **({} if self.carryover.reset is None else {"optimizer_reset": list(self.carryover.reset)}),
            **{key: now[key] for key in ("command", "versions", "git_commit", "device", "processes")},
        }
        is_start = environment is None and self.origin.checkpoint is None  # of a sweep's job
        facts = now if environment is None else environment
        if self.parent is not None:
            facts = facts | {"parent": {"run": str(self.parent.path.resolve()), "step": self.origin.step}}
        return facts | {"resumes": [*facts.get("resumes", []), *([] if is_start else [entry])]}


def plan_resume(run: RunConfig, stored: StoredRun, world: World = ALONE, *, branching: bool) -> ResumePlan:
    """Plan to resume ``stored`` with the settings of ``run``, in its directory or (``branching``) in another.

    The carryover goes by the checkpoint's own config: the run's may have been changed since, by a resume that was
    killed before it saved.  Raises ValueError for changes that cannot continue, and
    :class:`CheckpointError` where no checkpoint is intact.
    """
    directory = stored.directory
    check_changes(changes(stored.completed, run), branching=branching, has_base=run.lora.adapts)
    stored.check_places(run)
    origin = agreed_origin(world, directory, stored.step)
    if branching and origin.checkpoint is None:
        raise ValueError(f"{directory.path}: has no checkpoint yet to branch off from")
    carryover = Carryover()
    if origin.checkpoint is not None:
        carryover = Carryover.between(stored.completed_at(origin.checkpoint), run)
    return ResumePlan(
        origin,
        directory if branching else None,
        type(run).from_config(stored_config.untrusted(stored.completed, run.plugins)),
        since_older_version(changes(stored.raw, run), stored.raw),
        carryover,
        EarlierResults.read(directory, origin.step),
        notes=unused_cache(stored.raw, run),
    )


def unused_cache(raw: Mapping[str, Any], run: RunConfig) -> dict[str, str]:
    """A note where the stored config names a cache that is not used: a run directory decides no place of writing."""
    data = raw.get("data")
    stored = data.get("cache_dir") if isinstance(data, Mapping) else None
    used = getattr(run.data, "cache_dir", None)
    if not isinstance(stored, str) or used is None or Path(stored).expanduser() == Path(used).expanduser():
        return {}
    if Path(used).expanduser() != cache_folder():
        return {}  # the user has named it
    return {
        "cache": f"data.cache_dir={stored} stands in the stored config alone and is not used: a run directory decides "
        f"no place of writing; the data's cache is {used}; to use the other, give it again: data.cache_dir={stored}"
    }


def _class_name(target: Any) -> str:
    return str(target).rpartition(".")[2]


# --- a branch ----------------------------------------------------------------------------------------------------


def make_child(
    child: RunDirectory,
    plan: ResumePlan,
    environment: dict[str, Any],
    config_text: str,
    tokenizer: TokenizerConfig,
    built: Tokenizer,
) -> None:
    """Fill the new directory ``child`` of a branch with its parent's checkpoint, the rows up to it and the tokenizer.

    The config is written last: it makes the directory a complete run.  After an error nothing remains.
    """
    origin, parent = plan.origin, plan.parent
    assert origin.checkpoint is not None
    assert parent is not None
    try:
        copy_checkpoint(origin.checkpoint, child.checkpoints / origin.checkpoint.name)
        for source, target in ((parent.metrics, child.metrics), (parent.samples, child.samples)):
            if source.exists():
                with os.fdopen(open_regular(source), "rb") as rows, target.open("xb") as copy:
                    shutil.copyfileobj(rows, copy)
                drop_rows(target, lambda row: row["step"] > origin.step)
        write_copy(child.path, tokenizer, built)
        child.write_environment(plan.history(None, environment))
        write_atomically(child.config, config_text)
    except BaseException:
        shutil.rmtree(child.path, ignore_errors=True)
        raise
