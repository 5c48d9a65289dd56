"""Training speed of 124M and 1558M beside nanoGPT and HF Trainer, on the same tokens: the workers of `benchmarks`.

One case at a time.  Without a checkout of nanoGPT, or without transformers, their rows say so.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from benchmarks.__main__ import prepare
from benchmarks.gpu.case import Case, Row, Setup, train
from benchmarks.settings import Settings, parse
from benchmarks.task import Task
from benchmarks.workers import MARK

# model, contestant, worker, mode, seconds, overrides of ours; the most telling first, the slowest to compile last
SMALL, LARGE = "124M", "1558M"
ORDER = (
    (SMALL, "llmtrain, compiled", "ours", "bf16-compiled", 100, ()),
    (SMALL, "nanoGPT, compiled", "nanogpt", "bf16-compiled", 100, ()),
    (SMALL, "llmtrain", "ours", "bf16", 45, ()),
    (SMALL, "nanoGPT", "nanogpt", "bf16", 45, ()),
    (SMALL, "HF Trainer", "hf_trainer", "bf16", 60, ()),
    (LARGE, "llmtrain, compiled", "ours", "bf16-compiled", 150, ()),
    (LARGE, "llmtrain", "ours", "bf16", 75, ()),
    (SMALL, "llmtrain, graphs", "ours", "bf16-compiled", 100, ("runtime.cuda_graphs=true",)),
    (LARGE, "nanoGPT, compiled", "nanogpt", "bf16-compiled", 220, ()),
    (LARGE, "llmtrain, fp8, compiled", "ours", "bf16-compiled", 150, ("precision=fp8",)),
    (SMALL, "llmtrain, fp8, compiled", "ours", "bf16-compiled", 100, ("precision=fp8",)),
)
PROFILES = (("124M profile", "runtime.compile=false"), ("124M profile, compiled", "runtime.compile=true"))

PROFILED = ("runtime.profile=true", "data=python_docs", "loop.max_steps=10", "loop.eval_every=0", "loop.sample_every=0",
            "checkpoint.every_steps=0", "metrics.log_every=1", "schedule=constant")  # fmt: skip


def cases(setup: Setup) -> list[Case]:
    """Prepare the token file, and make the cases."""
    model, batch_size = ("tiny", 2) if setup.rehearses else ("gpt124m", 32)
    arguments = [
        "--model",
        model,
        "--batch-sizes",
        str(batch_size),
        "--steps",
        "40",
        "--warm-up",
        "20",
        "--block",
        "10",
    ]
    if setup.rehearses:
        arguments += ["--tokenizer", "byte", "--context", "64", "--steps", "2", "--warm-up", "1", "--block", "1"]
    settings = Settings.from_arguments(parse([*arguments, "--nanogpt", setup.nanogpt] if setup.nanogpt else arguments))
    folder = setup.out / "speed"
    (folder / "cache").mkdir(parents=True, exist_ok=True)
    prepared, _ = prepare(settings, folder)
    task = replace(prepared.task, checkout=settings.nanogpt)
    large = replace(task, model="tiny" if setup.rehearses else "gpt1558m", batch_size=2 if setup.rehearses else 16)
    if not setup.rehearses:
        large = replace(large, sizes=replace(task.sizes, num_layers=48, hidden_size=1600, num_heads=25), steps=20,
                        warm_up=10)  # fmt: skip
    made = []
    for name, contestant, module, mode, seconds, overrides in ORDER:
        of = replace(large if name == LARGE else task, overrides=overrides, precision=mode.partition("-")[0],
                     compiled="-" in mode)  # fmt: skip
        made.append(contender(f"{name} {contestant}", module, of, seconds, setup))
    tiny = ("model=tiny", "tokenizer=byte", "data.sequence_length=64") if setup.rehearses else ("model=gpt124m",)
    sequences = (f"accumulation.batch_size={batch_size}", f"accumulation.micro_batch_size={batch_size}")
    for name, override in PROFILES:
        needs_gpu = override.endswith("true")
        made.append(train(name, *tiny, *sequences, *PROFILED, override, needs_gpu=needs_gpu, seconds=90))
    return made


def contender(name: str, module: str, task: Task, seconds: float, setup: Setup) -> Case:
    """A worker of `benchmarks` with its task."""
    task = replace(task, folder=str(setup.out / "speed" / "".join(c if c.isalnum() else "-" for c in name)))
    is_compiled = task.compiled and setup.rehearses
    return Case(
        name, ("-m", "benchmarks.gpu.contender", module, task.to_json()), seconds=seconds, needs_gpu=is_compiled,
        python=sys.executable if module == "ours" else setup.peer_python, read=read_result(task, setup),
    )  # fmt: skip


def read_result(task: Task, setup: Setup) -> Callable[[Path, str, Row], list[Row]]:
    """A reader of a worker's answer."""

    def read(run: Path, output: str, row: Row) -> list[Row]:
        answers = [line for line in output.splitlines() if line.startswith(MARK)]
        if row["status"] != "ok" or not answers:
            return [row | ({"status": "failed"} if row["status"] == "ok" else {})]
        answer = json.loads(answers[-1].removeprefix(MARK))
        if "absent" in answer:
            return [row | {"status": "left out", "said": [answer["absent"]]}]
        speed = answer["tokens_per_second"]
        row |= {"tokens_per_second": speed, "memory_bytes": answer["memory_bytes"]}
        if setup.peak_flops:
            row["mfu"] = speed * task.sizes.flops_per_token(task.context) / setup.peak_flops
        return [row]

    return read
