"""``llmtrain resume RUN_DIR``: go on exactly where a run stopped."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmtrain.commands import FINISHED, INTERRUPTED, Invocation
from llmtrain.run import Run
from llmtrain.run_directory import RunDirectory

# Values whose change would make it another run: the tensors would not fit, or the data come in another order.
FIXED = (
    "model.",
    "tokenizer.",
    "objective.",
    "data.",
    "lora.",
    "weights.",
    "runtime.seed",
    "optimizer._target_",
    "name",
)

MOVABLE = ("data.path", "data.validation_path", "data.cache_dir")  # the data's fingerprint is compared instead


def main(run: Run, invocation: Invocation) -> int:
    """Continue the run at the target; overrides are shown, checked and recorded."""
    directory = RunDirectory.open(invocation.targets[0])
    check_changes(invocation.changes)
    console = Console(highlight=False)
    if invocation.changes:
        console.print(changes_table(invocation.changes))
    if not invocation.changes and directory.is_finished():
        console.print(Text(f"{directory.path}: finished already; to train on: loop.max_steps=N"))
        return FINISHED
    result = run.resume(directory, command=invocation.command, changes=invocation.changes)
    return FINISHED if result.exit_reason == "finished" else INTERRUPTED


def check_changes(changes: Sequence[tuple]) -> None:
    """Refuse what cannot continue.  Raises ValueError naming the key."""
    for key, before, after in changes:
        if key.startswith(FIXED) and key not in MOVABLE:
            raise ValueError(
                f"{key}={after}: this run was started with {before}, and cannot go on with another; "
                "start a new run, from its weights with: weights=checkpoint weights.path=RUN_DIR"
            )


def changes_table(changes: Sequence[tuple]) -> Table:
    """What differs from the stored config."""
    table = Table(title="changes to the stored config", title_justify="left", box=None, pad_edge=False)
    for heading in ("key", "stored", "now"):
        table.add_column(heading)
    for row in changes:
        table.add_row(*(Text(str(value)) for value in row))
    return table
