"""nanoGPT from a checkout: its model, optimizer and batches, in the loop of its ``train.py``.

Three things are not as its ``train.py`` has them: a CPU computes under autocast as well where the mode says bf16 (it
would silently stay in fp32), the layers have biases as GPT-2 and all the others here, and it neither evaluates nor
saves at step 0.
"""

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from benchmarks.task import Task
from benchmarks.workers import Absent, Stopwatch, serve
from benchmarks.workers.peers import BETAS, LEARNING_RATE, MAX_NORM, WEIGHT_DECAY, allow_tf32, start


def measure(task: Task) -> dict[str, Any]:
    """Train for so many steps."""
    if task.checkout is None:
        raise Absent("no checkout given: --nanogpt DIR")
    if not (Path(task.checkout) / "model.py").is_file():
        raise Absent(f"{task.checkout}: no model.py of nanoGPT in it")
    sys.path.insert(0, task.checkout)
    import numpy as np
    import torch
    from model import GPT, GPTConfig

    start(task)
    allow_tf32(task)
    sizes = task.sizes
    config = GPTConfig(
        block_size=task.context, vocab_size=sizes.padded_vocab_size, n_layer=sizes.num_layers, n_head=sizes.num_heads,
        n_embd=sizes.hidden_size, dropout=0.0, bias=True,
    )  # fmt: skip
    model = GPT(config).to(task.device)
    optimizer = model.configure_optimizers(WEIGHT_DECAY, LEARNING_RATE, BETAS, task.device)
    step_model = torch.compile(model) if task.compiled else model
    context = torch.autocast(task.device, torch.bfloat16) if task.precision == "bf16" else nullcontext()
    watch = Stopwatch(task)

    def get_batch() -> tuple[torch.Tensor, torch.Tensor]:
        data = np.memmap(task.tokens, dtype=np.uint16, mode="r")  # each time, as train.py does
        begins = torch.randint(len(data) - task.context, (task.batch_size,)).tolist()
        x, y = (
            torch.stack([torch.from_numpy(data[b + by : b + by + task.context].astype(np.int64)) for b in begins])
            for by in (0, 1)
        )
        if task.device == "cuda":
            return x.pin_memory().to("cuda", non_blocking=True), y.pin_memory().to("cuda", non_blocking=True)
        return x, y

    x, y = get_batch()
    done = False
    while not done:
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE
        with context:
            _, loss = step_model(x, y)
        x, y = get_batch()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()  # its log_interval is 1
        done = watch.step_done()
    kernel = "fused" if task.device == "cuda" else "not fused"
    return watch.result(note=f"train.py's loop; its AdamW ({kernel} here); autocast for bf16 on a CPU too; biases on")


if __name__ == "__main__":
    serve(measure, "torch")
