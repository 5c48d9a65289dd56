"""The weights that fine-tuning starts from: a checkpoint of transformers' GPT-2, random, which all contestants load.

It is made once, by the first that asks for it, and in a process of its own: what that takes is in nobody's memory.
"""

import importlib.util
import subprocess
import sys
from pathlib import Path

from benchmarks.task import Task
from benchmarks.workers import Absent

NAME = "gpt2"


def base_path(task: Task) -> Path:
    """Where it is, or is to be: beside the files that all read."""
    return Path(task.tokens).parent / NAME


def base(task: Task) -> Path:
    """The directory of the checkpoint, which is there afterwards.  Raises Absent without transformers."""
    path = base_path(task)
    if not path.exists():
        if importlib.util.find_spec("transformers") is None:
            raise Absent("No module named 'transformers'")
        command = [sys.executable, "-m", "benchmarks.workers.gpt2_base", task.to_json()]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"no base: {done.stderr[-2000:]}")
    return path


def make(task: Task) -> None:
    """Write it: sizes and vocabulary of the task, as published, so without padding."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from benchmarks.workers.peers import SEED

    torch.manual_seed(SEED)
    sizes = task.sizes
    config = GPT2Config(
        vocab_size=sizes.vocab_size, n_positions=task.context, n_embd=sizes.hidden_size, n_layer=sizes.num_layers,
        n_head=sizes.num_heads, embd_pdrop=0.0, resid_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    path = base_path(task)
    unfinished = path.with_suffix(".tmp")
    GPT2LMHeadModel(config).save_pretrained(unfinished)
    unfinished.replace(path)


if __name__ == "__main__":
    make(Task.from_json(sys.argv[1]))
