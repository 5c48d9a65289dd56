"""A run: train it from step 0, resume it, branch from it.

run = Run.compose("model=tiny", "tokenizer=byte", "loop.max_steps=10")
result = run.train()
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from llmtrain.base.files import sweep_leftovers, write_atomically
from llmtrain.base.outputs import check_output_directory, naming
from llmtrain.base.ranks import refuse_several_processes
from llmtrain.config import stored_config
from llmtrain.config.assemble import Parts, assemble, check_space, first_state
from llmtrain.config.overrides import overrides_of
from llmtrain.config.run_config import RunConfig
from llmtrain.lint import Case, lint, refuse
from llmtrain.metrics.jsonl import drop_rows
from llmtrain.run.directory import RunDirectory
from llmtrain.run.environment import describe_environment
from llmtrain.run.resume import ResumePlan, StoredRun, make_child, plan_resume
from llmtrain.run.session import RunResult, execute
from llmtrain.train.state import TrainState


@dataclass(frozen=True)
class Run(RunConfig):
    """A composed, checked run that can be trained."""

    def train(self, *, command: Sequence[str] = ()) -> RunResult:
        """Train from step 0 in a new run directory.

        Everything is checked, the data prepared and the model built before the directory is made.  Raises
        ValueError for mistakes of the user's, :class:`llmtrain.train.loop.TrainingFailed` and OSError for a failed run.
        """
        refuse_several_processes()
        self.check_directory()
        with self.runtime.session() as device:
            self.runtime.seed_everything()
            parts = assemble(self, device)
            self.metrics.check()
            check_space(self, parts)
            findings = lint(Case.of(self, parts, overrides_of(command) or self.overrides))
            refuse(findings)
            directory = self.create_directory()
            with directory.lock():
                self.describe(directory, device, command)
                return execute(self, parts, directory, first_state(self, parts), findings)

    def resume(
        self, directory: RunDirectory | StoredRun, *, step: int | None = None, command: Sequence[str] = ()
    ) -> RunResult:
        """Continue the run in ``directory`` from its newest intact checkpoint, or start it if it has none yet.

        Changes of the stored config are reported and recorded.  With ``step`` the newest checkpoint must be that of
        this step, and intact.  Nothing is written until all is checked.  Raises ValueError for changes that a resume
        cannot make.
        """
        refuse_several_processes()
        stored = directory if isinstance(directory, StoredRun) else StoredRun(directory.path, step)
        run_directory, step = stored.directory, stored.step
        if run_directory.is_older(step):
            raise ValueError(f"step={step}: not the newest checkpoint of {run_directory.path}; branch from it instead")
        with self.runtime.session(run_directory.recorded_threads()) as device, run_directory.lock():
            for folder in (run_directory.path, run_directory.checkpoints):
                sweep_leftovers(folder)
            plan, parts, state = self.restore(plan_resume(self, stored, branching=False), device, command)
            now = describe_environment(device, stored_config.redact_arguments(command))
            history = plan.history(run_directory.read_environment(), now)
            drop_rows(run_directory.samples, lambda row: row["step"] > state.step)
            run_directory.write_environment(history)
            if plan.changes:
                output_dir = stored.raw.get("output_dir", self.output_dir)
                run = replace(self, run_dir=stored.raw.get("run_dir"), output_dir=output_dir)
                write_atomically(run_directory.config, stored_config.dump(run))
            return execute(self, parts, run_directory, state, plan.findings, plan)

    def branch(
        self, parent: RunDirectory | StoredRun, *, step: int | None = None, command: Sequence[str] = ()
    ) -> RunResult:
        """Continue from the checkpoint of ``step`` (None: the newest) of ``parent`` in a new run directory.

        The parent, which may be running, is only read.  The child has the parent's checkpoint and its metrics and
        samples up to it.  Raises as :meth:`train` and :meth:`resume` do.
        """
        refuse_several_processes()
        stored = parent if isinstance(parent, StoredRun) else StoredRun(parent.path, step)
        self.check_directory()
        with self.runtime.session(stored.directory.recorded_threads()) as device:
            plan, parts, state = self.restore(plan_resume(self, stored, branching=True), device, command)
            check_space(self, parts)
            child = self.create_directory()
            with child.lock():
                now = describe_environment(device, stored_config.redact_arguments(command))
                make_child(child, plan, now, stored_config.dump(self))
                return execute(self, parts, child, state, plan.findings, plan)

    def restore(
        self, plan: ResumePlan, device: torch.device, command: Sequence[str]
    ) -> tuple[ResumePlan, Parts, TrainState]:
        """Assemble the parts, bring them and every random number generator to the origin of ``plan``, and check all.

        Writes nothing.  Raises ValueError for changes that cannot continue.
        """
        self.metrics.check()
        self.runtime.seed_everything()
        checkpoint = plan.origin.checkpoint
        parts = assemble(self, device, from_start=checkpoint is None)
        state = first_state(self, parts) if checkpoint is None else plan.carryover.restore(checkpoint, parts)
        plan = plan.checked(self, parts, state, overrides_of(command))
        refuse(plan.findings)
        return plan, parts, state

    def create_directory(self) -> RunDirectory:
        """Make the new run's directory."""
        if self.run_dir is not None:
            with naming("run_dir", self.run_dir):
                return RunDirectory.create_at(Path(self.run_dir))
        with naming("output_dir", self.output_dir):
            return RunDirectory.create(Path(self.output_dir), self.name)

    def check_directory(self) -> None:
        """Raise ValueError if the new run's directory cannot be made: before the work that comes first."""
        if self.run_dir is None:
            check_output_directory("output_dir", self.output_dir)
        elif os.path.lexists(self.run_dir):
            RunDirectory.create_at(Path(self.run_dir))  # refuses it
        else:
            check_output_directory("run_dir", self.run_dir)

    def describe(self, directory: RunDirectory, device: torch.device, command: Sequence[str]) -> None:
        """Write ``environment.json`` and ``config.yaml`` of a new run."""
        directory.write_environment(describe_environment(device, stored_config.redact_arguments(command)))
        write_atomically(directory.config, stored_config.dump(self))
