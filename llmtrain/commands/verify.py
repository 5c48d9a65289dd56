"""``llmtrain verify RUN_DIR``: a check of every byte of the checkpoints, and a replay of steps.

The replay proves that the run can be resumed.  It starts from the last checkpoint but one (or from step 0, where there
is only one) as a resumed run would, trains up to the last one in a temporary directory, and compares every loss and
gradient norm with the run's metrics and every tensor, counter and random number generator with those of the last
checkpoint: bit for bit where the arithmetic is reproducible, within ``tolerance`` where it is not.
"""

import dataclasses
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from llmtrain.base.checks import positive
from llmtrain.base.format import counted, size, visible
from llmtrain.base.invocation import FAILED, FINISHED, Invocation
from llmtrain.base.run_files import CONFIG, MANIFEST
from llmtrain.base.runtime import check_device
from llmtrain.base.tensor_files import CheckpointError
from llmtrain.checkpoint.directory import find_checkpoints, step_of
from llmtrain.checkpoint.format import read_state, verify_checkpoint
from llmtrain.config import stored_config
from llmtrain.config.assemble import MOVED_BASE, adding_remedy
from llmtrain.config.older_versions import complete
from llmtrain.distributed.local_sgd import LocalSgd
from llmtrain.metrics import read_metrics
from llmtrain.run.directory import RunDirectory
from llmtrain.run.load import MovedFiles
from llmtrain.run.places import find_places, move
from llmtrain.run.run import Run
from llmtrain.verify.replay import ReplayComparison, compare, replay


@dataclass(frozen=True)
class Verify:
    """The settings of ``conf/verify.yaml``."""

    replay_steps: int | None
    tolerance: float
    device: str
    weights: MovedFiles
    tokenizer: MovedFiles
    plugins: list[str]

    def __post_init__(self) -> None:
        check_device(self.device)
        if self.replay_steps is not None and self.replay_steps < 0:
            raise ValueError(f"replay_steps={self.replay_steps}: must be 0 (files alone) or more, or null for all")
        positive(tolerance=self.tolerance)


def main(settings: Verify, invocation: Invocation) -> int:
    """Check, replay and report; return 0 if everything agrees, else 1."""
    target = invocation.targets[0]
    console = Console(highlight=False)
    if (target / MANIFEST).is_file():
        return FINISHED if check_files(console, [target]) else FAILED
    directory = RunDirectory.open(target)
    checkpoints = find_checkpoints(target)
    if not checkpoints:
        raise ValueError(f"{target}: this run has no checkpoint yet")
    with directory.lock():
        if not check_files(console, checkpoints):
            return FAILED
        if settings.replay_steps == 0:
            console.print("files checked; nothing replayed (replay_steps=0)")
            return FINISHED
        return replay_and_compare(console, settings, directory, checkpoints)


def check_files(console: Console, checkpoints: Sequence[Path]) -> bool:
    """Compare every file with its manifest; return whether all are intact."""
    table = Table(box=None, pad_edge=False)
    table.add_column("checkpoint")
    table.add_column("size", justify="right")
    table.add_column("state")
    errors = []
    for path in checkpoints:
        total = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
        try:
            verify_checkpoint(path)
            state = Text("intact", style="green")
        except CheckpointError as error:
            errors.append(str(error))
            state = Text("damaged", style="bold red")
        table.add_row(Text(visible(path.name)), size(total), state)
    console.print(table)
    for message in errors:
        fail(console, message)
    return not errors


def fail(console: Console, message: str) -> int:
    """Print the error; return the exit status."""
    console.print(Text(f"failed: {visible(message)}", style="bold red"), soft_wrap=True)
    return FAILED


def replay_and_compare(console: Console, settings: Verify, directory: RunDirectory, checkpoints: Sequence[Path]) -> int:
    """Replay up to the last checkpoint, compare and report."""
    first, last = (checkpoints[-2] if len(checkpoints) > 1 else None), checkpoints[-1]
    start, end = (step_of(first) if first else 0), step_of(last)
    settled = last
    if changed := [step for step in changed_at(directory) if start < step < end]:
        end, settled = changed[0], first or last  # later steps were trained with other settings
    if settings.replay_steps is not None:
        end = min(end, start + settings.replay_steps)
    logged = [step for step in logged_at(directory) if start < step <= step_of(last)]
    if end != step_of(last) and not any(step <= end for step in logged):
        steps = f"the {counted(end - start, 'step')} to be replayed"
        if settings.replay_steps is not None and end == start + settings.replay_steps:
            steps = f"replay_steps={settings.replay_steps}"
        enough = f", or replay_steps={min(logged) - start}" if logged else ""
        raise ValueError(
            f"{steps}: none of them was logged (metrics.log_every), so that there is nothing to compare; "
            f"replay_steps=null{enough}"
        )
    stored = find_places(stored_config.load(settled / CONFIG), directory.path)
    base = settings.weights.path
    if base is not None and not read_state(settled).get("base"):
        raise ValueError(f"weights.path={base}: this run's checkpoints hold a whole model, no adapters; leave it out")
    values = complete(stored_config.untrusted(stored, settings.plugins))
    run = Run.from_config(move(values, base, settings.tokenizer.path))
    run = dataclasses.replace(run, runtime=dataclasses.replace(run.runtime, device=settings.device))
    if isinstance(run.distributed, LocalSgd):
        console.print(
            "files checked; nothing replayed: with distributed=local_sgd each process trained its own weights, and one "
            "process cannot do the steps of all"
        )
        return FINISHED
    run.runtime.torch_device()  # an error in these settings is not an error of the run
    if run.lora.adapts:
        with adding_remedy(MOVED_BASE):
            run.weights.fingerprint()
    console.print(f"\nreplaying {counted(end - start, 'step')} from {f'step {start:,}' if first else 'the start'}")
    with tempfile.TemporaryDirectory(prefix="llmtrain-verify-") as scratch, Progress(console=console) as progress:
        task = progress.add_task("", total=end - start, visible=console.is_terminal)
        try:
            replayed = replay(
                run, directory, Path(scratch), first, end, lambda: progress.advance(task),
                named_tokenizer=settings.tokenizer.path is not None,
            )  # fmt: skip
        except ValueError as error:  # the data are damaged, or other data
            return fail(console, "; ".join([str(error), *getattr(error, "__notes__", [])]))
        found = compare(replayed, directory, last if end == step_of(last) else None)
    return report(console, found, replayed.inexact, settings.tolerance)


def changed_at(directory: RunDirectory) -> list[int]:
    """The steps from which the run was resumed with other settings."""
    rows = read_metrics(directory.metrics)
    return [row["step"] for row in rows if row.get("event") == "resume" and row.get("changes")]


def logged_at(directory: RunDirectory) -> list[int]:
    """The steps that have a row in the metrics."""
    return [row["step"] for row in read_metrics(directory.metrics) if "loss" in row and "event" not in row]


def report(console: Console, found: ReplayComparison, inexact: str | None, tolerance: float) -> int:
    """Print what was compared; 0 if it agrees.  ``inexact`` says why bits may differ, None if they must not."""
    table = Table(box=None, pad_edge=False)
    for heading in ("compared", "number", "equal", "largest relative difference"):
        table.add_column(heading, justify="left" if heading == "compared" else "right")
    for group in found.groups:
        table.add_row(group.name, f"{group.count:,}", f"{group.equal:,}", f"{group.worst:.2g}" if group.worst else "0")
    console.print(table)
    allowed = 0.0 if inexact is None else tolerance
    bad = [group for group in found.groups if group.equal < group.count and not group.worst <= allowed]
    for group in bad:
        fail(console, group.first_difference)
    if bad:
        return FAILED
    how = "bit for bit" if found.equal else f"within {tolerance:g} ({inexact})"
    line = f"verified, {how}: a run resumed from its checkpoints repeats the original"
    console.print(Text(line, style="bold green"), soft_wrap=True)
    if found.remark:
        console.print(Text(visible(found.remark)), soft_wrap=True)
    return FINISHED
