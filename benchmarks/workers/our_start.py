"""The parts of our time to the first step, one after the other in one process."""

import time
from pathlib import Path
from typing import Any

from benchmarks.task import Task
from benchmarks.workers import serve, synchronize
from benchmarks.workers.our_loop import open_loop
from benchmarks.workers.ours import overrides


def measure(task: Task) -> dict[str, Any]:
    """Seconds of each part."""
    rows: dict[str, dict[str, float]] = {}
    mark = task.launched

    def ended(part: str) -> None:
        nonlocal mark
        synchronize(task.device if "torch" in "".join(rows) else "cpu")
        now = time.time()
        rows[part] = {"seconds": now - mark}
        mark = now

    ended("Python starts")
    from llmtrain.base.process import prepare_program

    prepare_program()
    import torch  # noqa: F401

    ended("import torch")
    from llmtrain.config.assemble import assemble
    from llmtrain.run.run import Run

    ended("import the rest")
    run = Run.compose(*overrides(task))
    ended("compose and check the config")
    with run.runtime.session() as device:
        run.runtime.seed_everything()
        parts = assemble(run, device)
        ended("data, model, optimizer")
        with open_loop(run, parts, Path(task.folder) / "run") as loop:
            loop.advance()
            ended("first step (and compiling)" if task.compiled else "first step")
    return {"rows": rows}


if __name__ == "__main__":
    serve(measure, "torch", "llmtrain")
