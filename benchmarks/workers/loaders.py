"""Loaders alone: batches of the training's size from the same token file, as fast as they come, and onto the device."""

import itertools
import time
from collections.abc import Iterator
from typing import Any

from benchmarks.task import Task
from benchmarks.workers import serve, synchronize
from benchmarks.workers.ours import overrides

SECONDS = 1.5
WARM_UP = 20  # batches


def measure(task: Task) -> dict[str, Any]:
    """Tokens a second of the contestant that the task names."""
    batches = MAKERS[task.contestant](task)
    for _ in itertools.islice(batches, WARM_UP):
        pass
    synchronize(task.device)
    count, start = 0, time.perf_counter()
    while (seconds := time.perf_counter() - start) < SECONDS:
        next(batches)
        count += 1
    synchronize(task.device)
    seconds = time.perf_counter() - start
    return {"tokens_per_second": count * task.batch_size * task.context / seconds}


def ours(task: Task) -> Iterator[Any]:
    """Our loader: a thread, every batch in a computed order, the file watched for changes."""
    from llmtrain import Run
    from llmtrain.data.loader import Loader

    run = Run.compose(*overrides(task))
    corpus = run.data.build(run.tokenizer.build())
    loader = Loader(
        corpus.train, run.objective.collate, seed=run.runtime.seed, shuffle=run.data.shuffle,
        batch_size=run.accumulation.batch_size_at, device=run.runtime.torch_device(), position=0, step=0, tokens=0,
    )  # fmt: skip
    with loader:
        while True:
            yield loader.next()


def nanogpt(task: Task) -> Iterator[Any]:
    """nanoGPT's ``get_batch``: a new memory map and a Python loop over the rows for each batch."""
    import numpy as np
    import torch

    while True:
        data = np.memmap(task.tokens, dtype=np.uint16, mode="r")
        begins = torch.randint(len(data) - task.context, (task.batch_size,)).tolist()
        for by in (0, 1):
            rows = [torch.from_numpy(data[b + by : b + by + task.context].astype(np.int64)) for b in begins]
            batch = torch.stack(rows)
            if task.device == "cuda":
                batch = batch.pin_memory().to("cuda", non_blocking=True)
        yield batch


def data_loader(task: Task, workers: int) -> Iterator[Any]:
    """torch's DataLoader over a memory map, shuffled."""
    import numpy as np
    import torch

    class Examples(torch.utils.data.Dataset):
        ids = np.memmap(task.tokens, dtype=np.uint16, mode="r")

        def __len__(self) -> int:
            return (len(self.ids) - 1) // task.context

        def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
            row = self.ids[index * task.context : (index + 1) * task.context + 1].astype(np.int64)
            return torch.from_numpy(row[:-1]), torch.from_numpy(row[1:])

    on_gpu = task.device == "cuda"
    loader = torch.utils.data.DataLoader(
        Examples(), task.batch_size, shuffle=True, num_workers=workers, pin_memory=on_gpu, drop_last=True,
        persistent_workers=workers > 0,
    )  # fmt: skip
    while True:
        for batch in loader:
            yield [part.to(task.device, non_blocking=True) for part in batch]


MAKERS = {
    "llmtrain": ours,
    "nanoGPT's get_batch": nanogpt,
    "DataLoader, no worker": lambda task: data_loader(task, 0),
    "DataLoader, 2 workers": lambda task: data_loader(task, 2),
}


if __name__ == "__main__":
    serve(measure, "torch")
