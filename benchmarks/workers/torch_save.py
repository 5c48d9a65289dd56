"""``torch.save`` of the same weights and AdamW state, as most training scripts save: training waits for it."""

import os
import time
from pathlib import Path
from typing import Any

from benchmarks.task import Task
from benchmarks.workers import serve, synchronize


def measure(task: Task) -> dict[str, Any]:
    """Seconds without and with a sync to disk, of the second save."""
    import torch

    sizes = task.sizes
    hidden = sizes.hidden_size
    shapes = [(sizes.vocab_size, hidden), (task.context, hidden)]
    for _ in range(sizes.num_layers):
        shapes += [(3 * hidden, hidden), (hidden, hidden), (4 * hidden, hidden), (hidden, 4 * hidden)]
    tensors = {
        f"{kind}.{number}": torch.randn(shape, device=task.device)
        for kind in ("weight", "exp_avg", "exp_avg_sq")
        for number, shape in enumerate(shapes)
    }
    for _ in range(2):
        path = Path(task.folder) / "checkpoint.pt"
        synchronize(task.device)
        start = time.perf_counter()
        torch.save(tensors, path)
        saved = time.perf_counter()
        with path.open("rb") as file:
            os.fsync(file.fileno())
        synced = time.perf_counter()
    size = sum(tensor.nbytes for tensor in tensors.values())
    return {"held_seconds": saved - start, "save_seconds": synced - start, "bytes": size}


if __name__ == "__main__":
    serve(measure, "torch")
