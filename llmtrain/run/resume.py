"""Going on: from which checkpoint, with what changed, and what of the saved state still counts.

Nothing of the run that is gone on from is written in here: where going on is refused, its files stay as they were.
"""

import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmtrain.base.files import write_atomically
from llmtrain.base.run_files import CONFIG
from llmtrain.base.tensor_files import CheckpointError
from llmtrain.checkpoint.directory import step_of
from llmtrain.checkpoint.format import copy_checkpoint, verify_checkpoint
from llmtrain.checkpoint.restore import newest_whole, restore
from llmtrain.config import stored_config
from llmtrain.config.older_versions import complete
from llmtrain.config.run_config import RunConfig
from llmtrain.config.stored_config import NOT_RUN_KEYS, load, untrusted
from llmtrain.lint import Finding
from llmtrain.metrics import Row, drop_rows, read_metrics
from llmtrain.model import LanguageModel
from llmtrain.run.directory import RunDirectory
from llmtrain.train.state import TrainState

Change = tuple[str, Any, Any]  # dotted key, stored value, new value

ABSENT = "not stored"  # the stored value of a key that the stored config does not have

# Values whose change would make it another run: the tensors would not fit, or the data come in another order.
FIXED = ("name", "model.", "tokenizer.", "objective.", "data.", "lora.", "weights.", "runtime.seed")
MOVABLE = ("data.path", "data.validation_path", "data.cache_dir")  # the data's fingerprint is compared instead

# Options of an optimizer that have no part in what state it keeps.
STATELESS = ("optimizer.lr", "optimizer.weight_decay", "optimizer.layer_decay")


# --- where from --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Origin:
    """What a run goes on from."""

    directory: RunDirectory
    config: Path  # the stored config
    checkpoint: Path | None  # None: nothing has been saved yet
    passed_over: tuple[tuple[Path, str], ...] = ()  # newer checkpoints that are not whole, and what is wrong with each

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return 0 if self.checkpoint is None else step_of(self.checkpoint)


def find_origin(directory: RunDirectory, step: int | None = None) -> Origin:
    """The checkpoint of ``step``; without one the newest that is whole.

    Raises :class:`CheckpointError` if the one that is named is damaged, or all are, and ValueError if there is none of
    that step.
    """
    checkpoints = directory.find_checkpoints()
    if step is not None:
        named = next((path for path in checkpoints if step_of(path) == step), None)
        if named is None:
            steps = ", ".join(str(step_of(path)) for path in checkpoints)
            kept = " (checkpoint.keep_last and keep_every decide which are kept)"
            there_is = f"it has those of the steps {steps}{kept}" if steps else "it has none yet"
            raise ValueError(f"checkpoint.step={step}: {directory.path} has no checkpoint of this step; {there_is}")
        verify_checkpoint(named)
        return Origin(directory, directory.config_at(step), named)
    if not checkpoints and (lost := last_saved(directory)) is not None:
        raise CheckpointError(
            f"{directory.checkpoints}: there is no checkpoint, though one was saved at step {lost}: they were removed, "
            "or not copied along; bring them back, or start a new run"
        )
    path, errors = newest_whole(checkpoints)
    if checkpoints and path is None:
        damage = "; ".join(map(str, errors))
        raise CheckpointError(
            f"{directory.path}: no checkpoint to go on from, all are damaged: {damage}. Nothing was changed; restore "
            "one of them, or start a new run"
        )
    newer = sorted((other for other in checkpoints if path is not None and other > path), reverse=True)
    passed_over = tuple((other, str(error)) for other, error in zip(newer, errors, strict=True))
    return Origin(directory, directory.config, path, passed_over)


def last_saved(directory: RunDirectory) -> int | None:
    """The last step whose checkpoint the metrics record; None if they know of none."""
    rows = read_metrics(directory.metrics) if directory.metrics.exists() else []
    return max((row["step"] for row in rows if row.get("event") == "save"), default=None)


# --- what differs ------------------------------------------------------------------------------------------------


def changes(before: Mapping[str, Any], run: RunConfig) -> list[Change]:
    """The values of ``run`` that are not those of the stored config ``before``; secrets and places are left out.

    Keys of an option that is no more used are not listed: they follow from the other option.
    """
    old, new = _flatten(stored_config.redact(before)), _flatten(stored_config.redact(stored_config.to_plain(run)))
    return [
        (key, old.get(key, ABSENT), value)
        for key, value in new.items()
        if old.get(key, ABSENT) != value and key not in NOT_RUN_KEYS
    ]


def since_older_version(changes: Sequence[Change], before: Mapping[str, Any]) -> list[Change]:
    """``changes``, a group that the stored config ``before`` did not have shortened to its option."""
    return [row for row in changes if row[0].split(".")[0] in before or row[0].endswith("._target_")]


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def check_changes(changes: Sequence[Change], *, branching: bool, has_base: bool = False) -> None:
    """Refuse what cannot continue.  A branch may have a name of its own, and what adapters stand on (``has_base``) may
    have been moved.  Raises ValueError naming the key."""
    movable = (*MOVABLE, *["name"] * branching, *["weights.path"] * has_base)
    for key, before, after in changes:
        if key.startswith(FIXED) and key not in movable:
            remedy = f"start a new run with it, llmtrain train … {key}={_shown(after)}"
            if not has_base and not key.startswith(("model.", "tokenizer.", "lora.")):
                remedy += ", from its weights with: weights=checkpoint weights.path=RUN_DIR"
            raise ValueError(
                f"{key}={_shown(after)}: this run was started with {_shown(before)}, and cannot go on with another; "
                f"{remedy}"
            )


def _shown(value: Any) -> str:
    """A config value as one would type it."""
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)


def check_length(
    before: RunConfig, run: RunConfig, max_steps: int, state: TrainState, num_sequences: int, kept: Sequence[int] = ()
) -> None:
    """Raise ValueError if the run, with its ``max_steps``, cannot go on to its end from ``state``.

    ``before`` is the run as it was stored, ``num_sequences`` the size of the training data, ``kept`` the steps of the
    checkpoints there are.
    """
    if state.step > max_steps:
        earlier = max((step for step in kept if step <= max_steps), default=None)
        branch = "" if earlier is None else f", or branch off from an earlier checkpoint: checkpoint.step={earlier}"
        raise ValueError(
            f"loop.max_steps={max_steps}: the run is at step {state.step} already; take more, as in "
            f"loop.max_steps={state.step + max_steps}{branch}"
        )
    if max_steps == run.loop.max_steps or run.loop.epochs is None or run.accumulation == before.accumulation:
        return
    length = run.data.sequence_length
    position = run.accumulation.position_after(state.step, length)
    if position != before.accumulation.position_after(state.step, length):
        batch = run.accumulation.batch_size_at(state.step, state.tokens)
        left = math.ceil(max(run.loop.epochs * num_sequences - state.position, 0) / batch)
        raise ValueError(
            f"loop.epochs={run.loop.epochs:g}: counts in steps of the batch size that the run has from step 0 on, and "
            f"the batch size changes; give the end in steps: loop.epochs=null loop.max_steps={state.step + left}"
        )


def rates(
    before: RunConfig, steps_before: int, run: RunConfig, max_steps: int, step: int
) -> tuple[float, float] | None:
    """The learning rate of the step after ``step`` by the stored config and now; None where it is the same.

    Beyond the stored end it is that of the last step.  What a recovery multiplies both with is left out.
    """
    if step >= max_steps:
        return None
    old = before.schedule(min(step, steps_before - 1), peak=before.optimizer.lr, total=steps_before)
    new = run.schedule(step, peak=run.optimizer.lr, total=max_steps)
    return None if math.isclose(old, new, rel_tol=1e-6, abs_tol=1e-15) else (old, new)


# --- the state ---------------------------------------------------------------------------------------------------


def come_back(
    checkpoint: Path, run: RunConfig, model: LanguageModel, optimizer: torch.optim.Optimizer
) -> tuple[TrainState, tuple[str, str] | None]:
    """Fill ``model`` and ``optimizer`` of ``run`` from a checkpoint, which may have been written under other settings.

    What of the state means nothing under the present ones is left as new.  That goes by the checkpoint's own config:
    the run's may have been changed since, by a resume that was killed before it saved.

    Returns the state, and, if the optimizer is of another kind and starts afresh, the names of both.  Raises
    :class:`CheckpointError` naming the file, and ValueError naming the optimizer's options that do not fit its state.
    """
    before = complete(stored_config.load(checkpoint / CONFIG))
    changed = {key: (old, new) for key, old, new in changes(before, run)}
    reset = changed.get("optimizer._target_")
    options = {key: pair for key, pair in changed.items() if key.startswith("optimizer.") and key not in STATELESS}
    try:
        state = restore(checkpoint, model, optimizer, fresh_optimizer=reset is not None)
    except CheckpointError as error:
        if reset is not None or not options:
            raise
        now, kept = (", ".join(f"{key}={pair[i]}" for key, pair in options.items()) for i in (1, 0))
        raise ValueError(
            f"{now}: needs other optimizer state than was saved ({error}); keep {kept}; or take an optimizer of "
            "another kind, whose state starts afresh; or start a new run from the weights: weights=checkpoint "
            f"weights.path={checkpoint}"
        ) from error
    if "recovery._target_" in changed:
        state.recovery = {}
    of_batch = {key for key in changed if key.startswith("accumulation.")}
    if of_batch - {"accumulation.batch_size"} or (of_batch and run.accumulation.is_probed):
        state.micro_batch_size = None
    if "precision.initial_scale" in changed:
        state.scaler = {}
    return state, None if reset is None else (_class_name(reset[0]), _class_name(reset[1]))


def has_optimizer_of(checkpoint: Path, run: RunConfig) -> bool:
    """Whether the optimizer state of a checkpoint is of the kind of optimizer that ``run`` has.

    True where the checkpoint's config cannot be read: that it is damaged is for others to tell.
    """
    try:
        stored = stored_config.load(checkpoint / CONFIG)
    except stored_config.ConfigError:
        return True
    return stored.get("optimizer", {}).get("_target_") == stored_config.to_plain(run.optimizer)["_target_"]


def _class_name(target: Any) -> str:
    return str(target).rpartition(".")[2]


# --- what is told ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seen:
    """What a run has been seen to do up to its checkpoint, which is written ahead of evaluation and samples."""

    validations: Sequence[Row]
    sampled_step: int | None  # the last one with a sample
    loss: float | None  # of the last step that was logged

    @classmethod
    def of(cls, directory: RunDirectory, step: int) -> "Seen":
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


@dataclass(frozen=True)
class Resumption:
    """What there is to tell, and to record, of one time that a run goes on."""

    origin: Origin
    parent: RunDirectory | None  # of a branch: the run that it leaves
    changes: Sequence[Change]
    learning_rate: tuple[float, float] | None  # of the next step, as stored and now, where it differs
    optimizer_reset: tuple[str, str] | None  # the names of the old and of the new optimizer, where it is another
    seen: Seen
    findings: Sequence[Finding]  # of the linter, about the changes

    @property
    def source(self) -> str | None:
        """The checkpoint: within the run's directory, or where the parent has it; None: from the start."""
        checkpoint = self.origin.checkpoint
        if checkpoint is None or self.parent is not None:
            return None if checkpoint is None else str(checkpoint.resolve())
        return str(checkpoint.relative_to(self.origin.directory.path))

    def events(self) -> Iterator[Row]:
        """Rows for the metrics and the display."""
        step = self.origin.step
        for _, message in self.origin.passed_over:
            yield {"event": "damaged", "step": step, "message": f"{message}; passed over"}
        if self.origin.checkpoint is not None or self.changes:
            row = {"event": "resume", "step": step, "from": self.source, "changes": [list(row) for row in self.changes]}
            yield row | ({} if self.learning_rate is None else {"rates": list(self.learning_rate)})
        if self.optimizer_reset is not None:
            old, new = self.optimizer_reset
            message = f"the saved state is {old}'s; {new} starts with a state of its own, all new"
            yield {"event": "optimizer_reset", "step": step, "message": message}

    def history(self, environment: dict[str, Any] | None, now: dict[str, Any]) -> dict[str, Any]:
        """``environment.json``, given the one there is and the facts of ``now``, with one more entry of ``resumes``."""
        entry = {
            "time": now["time"],
            "step": self.origin.step,
            "from": self.source,
            "changes": [list(row) for row in self.changes],
            **({} if self.optimizer_reset is None else {"optimizer_reset": list(self.optimizer_reset)}),
            **{key: now[key] for key in ("command", "versions", "git_commit", "device")},
        }
        is_start = environment is None and self.origin.checkpoint is None  # of a sweep's job
        facts = now if environment is None else environment
        if self.parent is not None:
            facts = facts | {"parent": {"run": str(self.parent.path.resolve()), "step": self.origin.step}}
        return facts | {"resumes": [*facts.get("resumes", []), *([] if is_start else [entry])]}


def make_child(child: RunDirectory, resumption: Resumption, environment: dict[str, Any], config_text: str) -> None:
    """Fill the new directory ``child`` with what a branch takes from its parent: the checkpoint, and the rows up to it.

    The config comes last: with it the directory is a run, and whole.  If it cannot be made, nothing remains.
    """
    origin, parent = resumption.origin, resumption.parent
    assert origin.checkpoint is not None
    assert parent is not None
    try:
        copy_checkpoint(origin.checkpoint, child.checkpoints / origin.checkpoint.name)
        for source, target in ((parent.metrics, child.metrics), (parent.samples, child.samples)):
            if source.exists():
                shutil.copyfile(source, target)
                drop_rows(target, lambda row: row["step"] > origin.step)
        child.write_environment(resumption.history(None, environment))
        write_atomically(child.config, config_text)
    except BaseException:
        shutil.rmtree(child.path, ignore_errors=True)
        raise


def load_run(run_dir: Path, step: int | None = None) -> dict[str, Any]:
    """The stored config that going on from ``step`` (None: the newest checkpoint) of a run starts from.

    It may name classes of a plugin; whoever resumes the run has to name the plugin again.  Where the run was made is
    left out: it may have been moved.
    """
    from llmtrain.checkpoint.format import verify_checkpoint
    from llmtrain.run.directory import RunDirectory  # imports torch

    directory = RunDirectory.open(run_dir)
    path = directory.config_at(step)
    if path != directory.config:
        verify_checkpoint(path.parent, only=path.name)
    return complete(untrusted(load(path))) | {"run_dir": None}
