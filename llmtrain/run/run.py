"""A run: train it from step 0, resume it, branch from it.

run = Run.compose("model=tiny", "tokenizer=byte", "loop.max_steps=10")
result = run.train()
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from llmtrain.base.files import sweep_leftovers, write_atomically
from llmtrain.base.outputs import check_output_directory, naming
from llmtrain.base.run_files import TOKENIZER
from llmtrain.base.world import ALONE, World
from llmtrain.config import stored_config
from llmtrain.config.assemble import Parts, assemble, check_space, first_state
from llmtrain.config.overrides import overrides_of
from llmtrain.config.run_config import RunConfig
from llmtrain.config.secret_values import redact_arguments
from llmtrain.distributed.session import join
from llmtrain.lint import Case, lint, refuse
from llmtrain.metrics.jsonl import drop_rows
from llmtrain.run.directory import RunDirectory
from llmtrain.run.environment import describe_environment
from llmtrain.run.resume import ResumePlan, make_child, plan_resume
from llmtrain.run.session import RunResult, execute
from llmtrain.run.stored_run import StoredRun
from llmtrain.run.tokenizer_copy import write_copy
from llmtrain.train.state import TrainState


@dataclass(frozen=True)
class Run(RunConfig):
    """A composed, checked run that can be trained."""

    def train(self, *, command: Sequence[str] = ()) -> RunResult:
        """Train from step 0 in a new run directory.

        Everything is checked, the data prepared and the model built before the directory is made.  Raises
        ValueError for mistakes of the user's, :class:`llmtrain.train.loop.TrainingFailed` and OSError for a failed run.
        """
        with self.ranks() as (world, device):
            world.first(self.check_place)
            self.runtime.seed_everything()
            world.mark("build", 0)
            parts = assemble(self, device, world=world)
            self.metrics.check()
            world.first(lambda: check_space(self, parts))
            findings = lint(Case.of(self, parts, overrides_of(command) or self.overrides))
            refuse(findings)
            directory = RunDirectory(Path(world.first(lambda: str(self.create_directory().path))))
            with locked_by_first(directory, world):
                world.begin(directory.path)
                if world.is_first:
                    self.describe(directory, device, command, world.size)
                    write_copy(directory.path, self.tokenizer, parts.tokenizer)
                world.barrier()
                return execute(self, parts, directory, first_state(self, parts), findings)

    @contextlib.contextmanager
    def ranks(self, directory: RunDirectory | None = None) -> Iterator[tuple[World, torch.device]]:
        """The ranks of this run and this rank's device, for the length of the run; ``directory``: of one resumed."""
        with contextlib.ExitStack() as stack:
            world = stack.enter_context(join(self.distributed, self.runtime))
            threads = None if directory is None else directory.recorded_threads(world.size)
            yield world, stack.enter_context(self.runtime.session(threads, ranks_here=world.local_size))

    def resume(
        self, directory: RunDirectory | StoredRun, *, step: int | None = None, command: Sequence[str] = ()
    ) -> RunResult:
        """Continue the run in ``directory`` from its newest intact checkpoint, or start it if it has none yet.

        Changes of the stored config are reported and recorded.  With ``step`` the newest checkpoint must be that of
        this step, and intact.  Nothing is written until all is checked.  Raises ValueError for changes that a resume
        cannot make.
        """
        stored = directory if isinstance(directory, StoredRun) else StoredRun(directory.path, step)
        run_directory, step = stored.directory, stored.step
        if run_directory.is_older(step):
            raise ValueError(f"step={step}: not the newest checkpoint of {run_directory.path}; branch from it instead")
        run_directory.check_places()
        with self.ranks(run_directory) as (world, device), locked_by_first(run_directory, world):
            world.begin(run_directory.path)
            for folder in (run_directory.path, run_directory.checkpoints) if world.is_first else ():
                sweep_leftovers(folder)
            world.barrier()
            environment = run_directory.read_environment()
            planned = plan_resume(self, stored, world, branching=False)
            plan, parts, state = self.restore(stored, planned, device, command, world)
            now = describe_environment(device, redact_arguments(command), world.size)
            if environment is None and plan.origin.checkpoint is None:  # the first start of a sweep's job
                now |= self.weights_record()
            plan = plan.on_machine(environment, now)
            if not world.is_first:
                world.barrier()
                return execute(self, parts, run_directory, state, plan.findings, plan)
            history = plan.history(environment, now)
            drop_rows(run_directory.samples, lambda row: row["step"] > state.step)
            run_directory.write_environment(history)
            if not os.path.lexists(run_directory.path / TOKENIZER):  # of a sweep's job, or of an older version
                write_copy(run_directory.path, self.tokenizer, parts.tokenizer)
            if plan.changes:
                output_dir = stored.raw.get("output_dir", self.output_dir)
                run = replace(self, run_dir=stored.raw.get("run_dir"), output_dir=output_dir, **stored.as_written(self))
                write_atomically(run_directory.config, stored_config.dump(run))
            world.barrier()
            return execute(self, parts, run_directory, state, plan.findings, plan)

    def branch(
        self, parent: RunDirectory | StoredRun, *, step: int | None = None, command: Sequence[str] = ()
    ) -> RunResult:
        """Continue from the checkpoint of ``step`` (None: the newest) of ``parent`` in a new run directory.

        The parent, which may be running, is only read.  The child has the parent's checkpoint and its metrics and
        samples up to it.  Raises as :meth:`train` and :meth:`resume` do.
        """
        stored = parent if isinstance(parent, StoredRun) else StoredRun(parent.path, step)
        with self.ranks(stored.directory) as (world, device):
            world.first(self.check_place)
            environment = stored.directory.read_environment()
            planned = plan_resume(self, stored, world, branching=True)
            plan, parts, state = self.restore(stored, planned, device, command, world)
            world.first(lambda: check_space(self, parts))
            child = RunDirectory(Path(world.first(lambda: str(self.create_directory().path))))
            with locked_by_first(child, world):
                world.begin(child.path)
                now = describe_environment(device, redact_arguments(command), world.size)
                plan = plan.on_machine(environment, now)
                now |= {key: environment[key] for key in ("weights",) if environment and key in environment}
                if world.is_first:
                    make_child(child, plan, now, stored_config.dump(self), stored.tokenizer(self), parts.tokenizer)
                world.barrier()
                return execute(self, parts, child, state, plan.findings, plan)

    def restore(
        self, stored: StoredRun, plan: ResumePlan, device: torch.device, command: Sequence[str], world: World = ALONE
    ) -> tuple[ResumePlan, Parts, TrainState]:
        """Assemble the parts, bring them and every random number generator to the origin of ``plan``, and check all.

        Writes nothing.  Raises ValueError for changes that cannot continue.
        """
        self.metrics.check()
        self.runtime.seed_everything()
        world.mark("build", 0)
        checkpoint = plan.origin.checkpoint
        tokenizer = stored.tokenizer(self)
        parts = assemble(self, device, tokenizer=tokenizer, from_start=checkpoint is None, world=world)
        world.mark("load", 0)
        state = first_state(self, parts) if checkpoint is None else plan.carryover.restore(checkpoint, parts, self)
        parts = replace(parts, length=self.length(parts.corpus.train, short=state.short_sequences))
        plan = plan.checked(self, parts, state, overrides_of(command))
        refuse(plan.findings)
        return plan, parts, state

    def check_place(self) -> None:
        """Raise ValueError if the run's directory cannot be made: before anything that takes time."""
        if self.run_dir is not None:
            RunDirectory.check_free(Path(self.run_dir))
        else:
            check_output_directory("output_dir", self.output_dir)

    def create_directory(self) -> RunDirectory:
        """Make the new run's directory."""
        if self.run_dir is not None:
            with naming("run_dir", self.run_dir):
                return RunDirectory.create_at(Path(self.run_dir))
        with naming("output_dir", self.output_dir):
            return RunDirectory.create(Path(self.output_dir), self.name)

    def describe(
        self, directory: RunDirectory, device: torch.device, command: Sequence[str], processes: int = 1
    ) -> None:
        """Write ``environment.json`` and ``config.yaml`` of a new run."""
        environment = describe_environment(device, redact_arguments(command), processes)
        directory.write_environment(environment | self.weights_record())
        write_atomically(directory.config, stored_config.dump(self))

    def weights_record(self) -> dict[str, str]:
        """The fingerprint of the weights that the run starts from, for ``environment.json``; {} where it has none."""
        fingerprint = self.weights.fingerprint()
        return {"weights": fingerprint} if fingerprint else {}


@contextlib.contextmanager
def locked_by_first(directory: RunDirectory, world: World) -> Iterator[None]:
    """Lock ``directory`` for all ranks: rank 0 holds the lock, and the error of one who has it is every rank's."""
    with contextlib.ExitStack() as stack:
        world.first(lambda: stack.enter_context(directory.lock()))
        yield
