"""What saving costs training: blocks of steps with no save, one behind training's back, and one that it waits for.

The three kinds of blocks take turns in one process, on the same model; a block's save falls on its first step.
"""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.task import Task
from benchmarks.workers import serve, synchronize
from benchmarks.workers.our_loop import open_loop
from benchmarks.workers.ours import overrides

if TYPE_CHECKING:
    from llmtrain.train.loop import Loop

MODES = ("none", "asynchronous", "synchronous")


def measure(task: Task) -> dict[str, Any]:
    """A block of each kind."""
    from llmtrain.base.process import prepare_program

    prepare_program()
    from llmtrain import Run
    from llmtrain.base.run_files import METRICS
    from llmtrain.config.assemble import assemble
    from llmtrain.metrics import read_metrics

    run = Run.compose(*overrides(task), "loop.max_steps=1000000", "checkpoint.keep_last=2")
    rows: dict[str, dict[str, float]] = {}
    with run.runtime.session() as device:
        run.runtime.seed_everything()
        parts = assemble(run, device)
        with open_loop(run, parts, Path(task.folder) / "run") as loop:
            for mode in MODES:  # the first of each touches fresh memory and disk
                block(loop, mode, task.warm_up, task.device)
            for mode in MODES:
                rows[mode] = {"step_seconds": block(loop, mode, task.steps, task.device) / task.steps}
                if mode != "none":
                    saves = [row for row in read_metrics(loop.log.run_dir / METRICS) if row.get("event") == "save"]
                    rows[mode] |= {"held_seconds": saves[-1]["held_seconds"], "save_seconds": saves[-1]["seconds"]}
                    rows[mode]["bytes"] = parts.checkpoint_bytes()
    return {"rows": rows}


def block(loop: "Loop", mode: str, steps: int, device: str) -> float:
    """Seconds that ``steps`` steps take, a save of the kind begun with the first; its end is not waited for."""
    loop.saves.collect(wait=True)
    loop.saver.is_behind = mode == "asynchronous"
    synchronize(device)
    start = time.perf_counter()
    for step in range(steps):
        if step == 0 and mode != "none":
            loop.save()
        loop.advance()
    synchronize(device)
    seconds = time.perf_counter() - start
    loop.saves.collect(wait=True)
    return seconds


if __name__ == "__main__":
    serve(measure, "torch", "llmtrain")
