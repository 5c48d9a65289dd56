"""``llmtrain resume RUN_DIR``: continue a run exactly where it stopped, or branch from one of its checkpoints."""

import shlex
from collections.abc import Sequence

from llmtrain.base.format import visible
from llmtrain.base.invocation import FINISHED, INTERRUPTED, Invocation
from llmtrain.commands.ranks import start_ranks
from llmtrain.run.changes import Change, changes, check_changes
from llmtrain.run.resume import find_origin
from llmtrain.run.run import Run
from llmtrain.run.stored_run import StoredRun


def main(run: Run, invocation: Invocation) -> int:
    """Continue the run at the target.

    From a checkpoint that is not its newest, or with ``run_dir=…``, it continues in a new run directory.
    """
    stored = invocation.stored
    assert isinstance(stored, StoredRun)
    directory = stored.directory
    branching = run.run_dir is not None or directory.is_older(stored.step)
    changed = changes(stored.completed, run)
    check_changes(changed, branching=branching, has_base=run.lora.adapts)  # before anything that takes time
    if branching:
        if (status := start_ranks(run, invocation)) is not None:
            return status
        result = run.branch(stored, command=invocation.command)
        return FINISHED if result.exit_reason == "finished" else INTERRUPTED
    if run.output_dir != stored.output_dir:
        raise ValueError(
            f"output_dir={run.output_dir}: this run continues in {directory.path}; to branch into another directory: "
            "run_dir=DIR, or an older checkpoint: step=N"
        )
    done = directory.finished_step()
    if done is not None and changes_nothing(changed, done) and is_at_end(stored, done):
        path = directory.path
        longer = run.loop.times(2)
        print(visible(f"{path}: finished already, at step {done:,}; to train on: "
                      f"llmtrain resume {shlex.quote(str(path))} {longer}"))  # fmt: skip
        return FINISHED
    if (status := start_ranks(run, invocation)) is not None:
        return status
    result = run.resume(stored, command=invocation.command)
    return FINISHED if result.exit_reason == "finished" else INTERRUPTED


def changes_nothing(changed: Sequence[Change], done: int) -> bool:
    """True if a run that has done so many steps has none left: at most its end is named in other words."""
    return all((key, now) in (("loop.max_steps", done), ("loop.epochs", None)) for key, _, now in changed)


def is_at_end(stored: StoredRun, finished: int) -> bool:
    """True if the run has an intact checkpoint of the step that it finished at; else the steps to it are done again."""
    origin = find_origin(stored.directory, stored.step)
    return origin.step >= finished and not origin.passed_over
