"""Fine-tuning of ours, from weights of transformers: a training run, and what its checkpoint holds."""

from pathlib import Path
from typing import Any

from benchmarks.task import Task
from benchmarks.workers import bytes_below, ours, serve
from benchmarks.workers.gpt2_base import base


def measure(task: Task) -> dict[str, Any]:
    """As in ``ours``; the checkpoint is the one at the end of the run, and has no part in speed and memory."""
    base(task)
    result = ours.measure(task)

    from safetensors import safe_open

    (checkpoint,) = (Path(task.folder) / "run" / "checkpoints").iterdir()
    trained = 0
    with safe_open(checkpoint / "model.safetensors", "pt") as file:  # of a model with adapters only what is trained
        for name in file.keys():  # noqa: SIM118 - no mapping
            rows, *columns = file.get_slice(name).get_shape()
            trained += rows * (columns[0] if columns else 1)
    return result | {"trained_parameters": trained, "checkpoint_bytes": bytes_below(checkpoint)}


if __name__ == "__main__":
    serve(measure, "torch", "llmtrain")
