"""``llmtrain resume RUN_DIR``: go on exactly where a run stopped, or branch off from one of its checkpoints."""

import shlex

from llmtrain.base.format import visible
from llmtrain.base.invocation import FINISHED, INTERRUPTED, Invocation
from llmtrain.config import stored_config
from llmtrain.config.older_versions import complete
from llmtrain.run.directory import RunDirectory
from llmtrain.run.resume import changes, check_changes, find_origin
from llmtrain.run.run import Run


def main(run: Run, invocation: Invocation) -> int:
    """Continue the run at the target.

    From a checkpoint that is not its newest, or with ``run_dir=…``, that is done in a run directory of its own.
    """
    directory, step = RunDirectory.open(invocation.targets[0]), invocation.step
    branching = run.run_dir is not None or directory.is_older(step)
    stored = complete(stored_config.load(directory.config_at(step)))
    changed = changes(stored, run)
    check_changes(changed, branching=branching, has_base=run.lora.adapts)  # ahead of all that takes time
    if branching:
        result = run.branch(directory, step=step, command=invocation.command)
        return FINISHED if result.exit_reason == "finished" else INTERRUPTED
    if run.output_dir != stored["output_dir"]:
        raise ValueError(
            f"output_dir={run.output_dir}: this run goes on in {directory.path}; to branch off into another directory: "
            "run_dir=DIR, or an older checkpoint: checkpoint.step=N"
        )
    if directory.is_finished() and not changed and not (origin := find_origin(directory, step)).passed_over:
        path, done = directory.path, origin.step
        epochs = run.loop.epochs
        longer = f"loop.max_steps={2 * done}" if epochs is None else f"loop.epochs={2 * epochs:g}"
        print(visible(f"{path}: finished already, at step {done:,}; to train on: "
                      f"llmtrain resume {shlex.quote(str(path))} {longer}"))  # fmt: skip
        return FINISHED
    result = run.resume(directory, step=step, command=invocation.command)
    return FINISHED if result.exit_reason == "finished" else INTERRUPTED
