"""What the peers' loops have in common."""

from typing import Any

from benchmarks.task import Task

LEARNING_RATE = 3e-4
WEIGHT_DECAY = 0.1
BETAS = (0.9, 0.95)
MAX_NORM = 1.0
SEED = 1234


def start(task: Task) -> None:
    """Threads and seed."""
    import torch

    torch.set_num_threads(task.threads)
    torch.manual_seed(SEED)


def allow_tf32(task: Task) -> None:
    """Allow TensorFloat-32 on a GPU in every mode but fp32, as the peers do, and ours with ``precision=tf32``.

    Not for the Trainer: it has a setting for it, by a newer interface of torch that does not go with this one.
    """
    import torch

    if task.device == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = task.precision != "fp32"


class Windows:
    """Sequences from random places of the token file, enough for the task, as a torch dataset."""

    def __init__(self, task: Task, extra: int) -> None:
        import numpy as np

        self._ids = np.memmap(task.tokens, np.uint16, "r")
        self._length = task.context + extra
        self._count = task.batch_size * (task.warm_up + task.steps + 2)
        self._begins = np.random.default_rng(SEED).integers(len(self._ids) - self._length, size=self._count)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Any:
        import numpy as np
        import torch

        begin = self._begins[index]
        return torch.from_numpy(self._ids[begin : begin + self._length].astype(np.int64))
