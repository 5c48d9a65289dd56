"""Before anything is measured: what the machine is, the token file and the text that all contestants read."""

import platform
import subprocess
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.task import Task
from benchmarks.workers import serve
from benchmarks.workers.ours import overrides

SEPARATOR = "<|endoftext|>"


def measure(task: Task) -> dict[str, Any]:
    """Write the files, fill our data cache, and describe the machine; ``device`` and ``threads`` may be open here."""
    import torch

    from llmtrain import Run
    from llmtrain.base.device import available_memory, device_name
    from llmtrain.base.threads import physical_cores
    from llmtrain.data.cache.document_encoder import encode_documents
    from llmtrain.data.order.document_split import Split
    from llmtrain.data.python_stdlib import PythonStdlib
    from llmtrain.model.gpt import GPTConfig
    from llmtrain.model.layers.padded_vocabulary import padded_size
    from llmtrain.run.environment import git_commit

    device = task.device if task.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    threads = task.threads or physical_cores()
    torch.set_num_threads(threads)
    folder = Path(task.tokens).parent
    source = PythonStdlib(1, 0.0, False, str(folder / "cache"), Split.tokens).source()
    if not Path(task.text).exists():
        text = SEPARATOR.join(piece.text for piece in source.pieces())
        Path(task.text).write_text(text, encoding="utf-8")
    basic = Run.compose(f"model={task.model}", f"tokenizer={task.tokenizer}", *task.overrides)
    tokenizer = basic.tokenizer.build()
    if not isinstance(basic.model, GPTConfig):
        raise ValueError(f"model={task.model}: the contestants are GPT-2s; take one of the gpt options, or tiny")
    vocab_size = basic.vocab_size(tokenizer)
    if vocab_size > 1 << 16:
        raise ValueError(f"tokenizer={task.tokenizer}: its ids do not fit the uint16 that all contestants read")
    with Path(task.tokens).open("wb") as file:
        for encoded in encode_documents(source.pieces(), tokenizer, 0.0):
            file.write(encoded.ids.astype(np.uint16).tobytes())
    run = Run.compose(*overrides(task), f"runtime.num_threads={threads}", f"runtime.device={device}")
    run.data.build(tokenizer)
    sizes = {
        "num_layers": basic.model.num_layers, "hidden_size": basic.model.hidden_size,
        "num_heads": basic.model.num_heads, "vocab_size": vocab_size, "padded_vocab_size": padded_size(vocab_size),
    }  # fmt: skip
    huge_pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return {
        "device": device,
        "threads": threads,
        "sizes": sizes,
        "machine": {
            "device": device_name(torch.device(device)),
            "memory_available": available_memory(),
            "system": platform.platform(),
            "python": platform.python_version(),
            "transparent_huge_pages": huge_pages.read_text().strip() if huge_pages.exists() else None,
            "cuda": torch.version.cuda,
            "compiler": first_line("g++", "--version"),
        },
        "commit": git_commit(Path(__file__).parent),
    }


def first_line(*command: str) -> str | None:
    """What a program says of itself."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except OSError:
        return None
    return done.stdout.partition("\n")[0] or None


if __name__ == "__main__":
    serve(measure, "torch", "numpy", "tiktoken", "llmtrain")
