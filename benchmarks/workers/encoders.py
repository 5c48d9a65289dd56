"""Tokenisers alone, GPT-2's encoding, on all cores."""

import time
from pathlib import Path
from typing import Any

from benchmarks.task import Task
from benchmarks.workers import peak_memory, serve

SEPARATOR = "<|endoftext|>"


def measure(task: Task) -> dict[str, Any]:
    """Seconds and ids of the contestant that the task names."""
    seconds, tokens, note = MAKERS[task.contestant](task)
    size = Path(task.text).stat().st_size
    return {
        "bytes_per_second": size / seconds, "tokens": tokens, "memory_bytes": peak_memory("cpu"), "note": note,
    }  # fmt: skip


def documents(task: Task) -> list[str]:
    """The documents of the text, but those of white space alone, which ours leaves out as well."""
    text = Path(task.text).read_text(encoding="utf-8")
    return [document for document in text.split(SEPARATOR) if document.strip()]


def ours(task: Task) -> tuple[float, int, str]:
    """``data=text``: from the file to synced shards with their sha256, in bounded memory."""
    from llmtrain import Run

    run = Run.compose(
        "tokenizer=gpt2", "data=text", f"data.path='{task.text}'", f"data.separator='{SEPARATOR}'",
        "data.validation_fraction=0", f"data.cache_dir={task.folder}/cache", "model.context_length=64",
    )  # fmt: skip
    tokenizer = run.tokenizer.build()
    start = time.perf_counter()
    corpus = run.data.build(tokenizer)
    seconds = time.perf_counter() - start
    return seconds, corpus.train.tokens, "from the file to synced, checksummed shards"


def tiktoken_batch(task: Task) -> tuple[float, int, str]:
    """tiktoken's own threads, from memory to memory."""
    from llmtrain.tokenizer.gpt2 import GPT2

    encoding = GPT2().build().encoding
    texts = documents(task)
    start = time.perf_counter()
    encoded = encoding.encode_ordinary_batch(texts, num_threads=task.threads)
    seconds = time.perf_counter() - start
    return seconds, sum(map(len, encoded)) + len(texts), "encode_ordinary_batch; text and ids in memory, none written"


def hugging_face(task: Task) -> tuple[float, int, str]:
    """Hugging Face tokenizers, made of the same merge ranks."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers.convert_slow_tokenizer import TikTokenConverter

    ranks = Path(__file__).parents[2] / "llmtrain" / "tokenizer" / "gpt2.tiktoken"
    tokenizer = TikTokenConverter(str(ranks)).converted()
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)  # GPT-2's pattern, in native code
    texts = documents(task)
    start = time.perf_counter()
    encoded = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    seconds = time.perf_counter() - start
    tokens = sum(len(each.ids) for each in encoded) + len(texts)
    return seconds, tokens, "encode_batch_fast; text and ids in memory, none written"


MAKERS = {"llmtrain": ours, "tiktoken, batch": tiktoken_batch, "tokenizers, batch": hugging_face}


if __name__ == "__main__":
    serve(measure, "tiktoken", "tokenizers")
