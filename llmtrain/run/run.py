"""A run: train it from step 0, go on with it, branch off from it.

run = Run.compose("model=tiny", "tokenizer=byte", "loop.max_steps=10")
result = run.train()
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from llmtrain.base.files import sweep_leftovers, write_atomically
from llmtrain.checkpoint.directory import step_of
from llmtrain.config import stored_config
from llmtrain.config.older_versions import complete
from llmtrain.config.overrides import overrides_of
from llmtrain.config.run_config import Parts, RunConfig
from llmtrain.lint import Case, Finding, lint, lint_changes, refuse
from llmtrain.metrics.jsonl import drop_rows
from llmtrain.run.directory import RunDirectory
from llmtrain.run.environment import describe_environment
from llmtrain.run.resume import (
    Origin,
    Resumption,
    Seen,
    changes,
    check_changes,
    check_length,
    come_back,
    find_origin,
    make_child,
    rates,
    since_older_version,
)
from llmtrain.run.session import Result, execute
from llmtrain.train.state import TrainState


@dataclass(frozen=True)
class Run(RunConfig):
    """A composed, checked run that can be trained."""

    def train(self, *, command: Sequence[str] = ()) -> Result:
        """Train from step 0 in a new run directory.

        Everything is checked, the data prepared and the model built before the directory is made.  Raises
        ValueError for what the user can mend, :class:`llmtrain.train.loop.TrainingFailed` and OSError for a failed run.
        """
        with self.runtime.session() as device:
            self.runtime.seed_everything()
            parts = self.assemble(device)
            self.metrics.check()
            self.check_space(parts)
            findings = lint(self.lint_case(parts, overrides_of(command) or self.overrides))
            refuse(findings)
            directory = self.create_directory()
            with directory.lock():
                self.describe(directory, device, command)
                return execute(self, parts, directory, self.first_state(parts), findings=findings)

    def resume(self, directory: RunDirectory, *, step: int | None = None, command: Sequence[str] = ()) -> Result:
        """Continue the run in ``directory`` from its newest whole checkpoint, or start it if it has none yet.

        What differs from the stored config is told and recorded.  With ``step`` the newest checkpoint must be that of
        this step, and whole.  Until all is checked nothing is written: raises ValueError for what cannot go on.
        """
        if directory.is_older(step):
            raise ValueError(f"checkpoint.step={step}: not the newest of {directory.path}; branch off from it instead")
        with self.runtime.session() as device, directory.lock():
            for folder in (directory.path, directory.checkpoints):
                sweep_leftovers(folder)
            parts, state, resumption = self.come_back(find_origin(directory, step), device, command)
            now = describe_environment(device, stored_config.redact_arguments(command))
            history = resumption.history(directory.read_environment(), now)
            drop_rows(directory.samples, lambda row: row["step"] > state.step)
            directory.write_environment(history)
            if resumption.changes:
                made = stored_config.load(directory.config)
                run = replace(self, run_dir=made.get("run_dir"), output_dir=made.get("output_dir", self.output_dir))
                write_atomically(directory.config, stored_config.dump(run))
            return execute(self, parts, directory, state, resumption=resumption)

    def branch(self, parent: RunDirectory, *, step: int | None = None, command: Sequence[str] = ()) -> Result:
        """Go on from the checkpoint of ``step`` (None: the newest) of ``parent`` in a new run directory.

        Of the parent, which may be at work, everything is read and nothing written.  The child has the parent's
        checkpoint and, up to it, metrics and samples.  Raises as :meth:`train` and :meth:`resume` do.
        """
        with self.runtime.session() as device:
            origin = find_origin(parent, step)
            if origin.checkpoint is None:
                raise ValueError(f"{parent.path}: has no checkpoint yet to branch off from")
            parts, state, resumption = self.come_back(origin, device, command, parent=parent)
            self.check_space(parts)
            child = self.create_directory()
            with child.lock():
                now = describe_environment(device, stored_config.redact_arguments(command))
                make_child(child, resumption, now, stored_config.dump(self))
                return execute(self, parts, child, state, resumption=resumption)

    def come_back(
        self, origin: Origin, device: torch.device, command: Sequence[str], *, parent: RunDirectory | None = None
    ) -> tuple[Parts, TrainState, Resumption]:
        """Everything as it was at ``origin``, and what differs from then; ``parent``: the run that a branch leaves.

        Writes nothing.  Raises ValueError for changes that cannot go on.
        """
        stored = stored_config.untrusted(stored_config.load(origin.config), self.plugins)
        completed = complete(stored)
        check_changes(changes(completed, self), branching=parent is not None, has_base=self.lora.adapts)
        before = type(self).from_config(completed)
        self.metrics.check()
        self.runtime.seed_everything()
        parts = self.assemble(device, from_start=origin.checkpoint is None)
        seen = Seen.of(origin.directory, origin.step)
        reset = None
        if origin.checkpoint is None:
            state = self.first_state(parts)
        else:
            state, reset = self.restore(origin.checkpoint, parts)
        self.check_data(state, parts)
        steps = before.loop.total_steps(before.accumulation, len(parts.corpus.train), before.data.sequence_length)
        check_length(before, self, parts.max_steps, state, len(parts.corpus.train),
                     [step_of(path) for path in origin.directory.find_checkpoints()])  # fmt: skip
        all_changes = since_older_version(changes(stored, self), stored)
        findings: list[Finding] = []
        if not origin.directory.environment.exists():  # a job of a sweep starts by being resumed
            findings = lint(self.lint_case(parts, origin.directory.read_overrides()))
        elif all_changes:
            case = self.lint_case(parts, overrides_of(command))
            findings = lint_changes(replace(case, run=before, max_steps=steps), case)
        refuse(findings)
        learning_rate = rates(before, steps, self, parts.max_steps, state.step)
        return parts, state, Resumption(origin, parent, all_changes, learning_rate, reset, seen, findings)

    def restore(self, checkpoint: Path, parts: Parts) -> tuple[TrainState, tuple[str, str] | None]:
        """Bring ``parts`` and every random number generator to where they were at ``checkpoint``.

        Returns the state, and, if the checkpoint's optimizer is of another kind than this run's, which then starts
        afresh, the names of both.
        """
        state, reset = come_back(checkpoint, self, parts.model, parts.optimizer)
        parts.precision.load_state_dict(state.scaler)
        state.restore_rng(parts.device)
        return state, reset

    def check_data(self, state: TrainState, parts: Parts) -> None:
        """Raise ValueError if the data are not those that ``state`` counts in."""
        if state.data != parts.corpus.fingerprint:
            raise ValueError(
                f"data: not what this run was started on ({parts.corpus.description}); it was edited, moved or "
                "prepared otherwise, and step and position mean nothing in it; restore it, name the place that it "
                "was moved to, data.path=…, or start a new run from these weights: weights=checkpoint "
                "weights.path=RUN_DIR"
            )
        self.check_base(state)

    def lint_case(self, parts: Parts, overrides: Sequence[str]) -> Case:
        """The run as the linter takes it; ``overrides``: the keys that the user has set, as ``key=value``."""
        return Case(
            self, parts.tokenizer, parts.corpus, parts.model, parts.max_steps, parts.device, parts.optimizer, overrides
        )

    def create_directory(self) -> RunDirectory:
        """The new run's directory."""
        if self.run_dir is not None:
            return RunDirectory.create_at(Path(self.run_dir))
        return RunDirectory.create(Path(self.output_dir), self.name)

    def describe(self, directory: RunDirectory, device: torch.device, command: Sequence[str]) -> None:
        """Write ``environment.json`` and ``config.yaml`` of a new run."""
        directory.write_environment(describe_environment(device, stored_config.redact_arguments(command)))
        write_atomically(directory.config, stored_config.dump(self))
