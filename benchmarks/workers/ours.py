"""A real run of ours, by ``Run.train``, read from its metrics."""

from pathlib import Path
from typing import Any

from benchmarks.task import Task
from benchmarks.workers import serve, training_result


def overrides(task: Task) -> list[str]:
    """What makes our run the one that all contestants train."""
    return [
        f"model={task.model}", f"model.context_length={task.context}", f"tokenizer={task.tokenizer}",
        "data=shards", f"data.path='{task.tokens}'", "data.format=nanogpt", "data.validation_fraction=0",
        f"precision={task.precision}", f"runtime.compile={str(task.compiled).lower()}",
        f"runtime.device={task.device}", f"runtime.num_threads={task.threads}",
        f"accumulation.batch_size={task.batch_size}", f"accumulation.micro_batch_size={task.batch_size}",
        f"loop.max_steps={task.warm_up + task.steps}", "loop.eval_every=0", "loop.sample_every=0",
        "schedule=constant", f"metrics.log_every={task.block}", "checkpoint.every_steps=0",
        f"run_dir='{Path(task.folder) / 'run'}'", *task.overrides,
    ]  # fmt: skip


def measure(task: Task) -> dict[str, Any]:
    """Train for so many steps; the checkpoint at the end of a run is not in the figures."""
    if task.prepare_process:
        from llmtrain.base.process import prepare_program

        prepare_program()
    from llmtrain import Run
    from llmtrain.metrics import read_metrics

    run = Run.compose(*overrides(task))
    directory = run.train().run_dir
    rows = [row for row in read_metrics(directory / "metrics.jsonl") if "loss" in row and "event" not in row]
    measured = [row for row in rows if row["step"] > task.warm_up]
    return training_result(
        task,
        [row["step_seconds"] for row in measured],
        memory_bytes=max(row["memory_bytes"] for row in measured),
    )


if __name__ == "__main__":
    serve(measure, "torch", "llmtrain")
