"""Runs as a user has them: plan against measured memory, a checkpoint's stall, signals, decoding, a real halving."""

import json
from collections.abc import Callable
from pathlib import Path

from benchmarks.gpu.case import Case, Row, Setup, read_run, train, worker

COMMON = ("data=python_stdlib", "loop.eval_every=0", "loop.sample_every=0", "schedule=constant", "metrics.log_every=1",
          "runtime.compile=false")  # fmt: skip
NO_SAVES = ("checkpoint.every_steps=0", "loop.max_steps=5")
PLANNED = {
    "124M, 32 sequences": ("model=gpt124m", 32, ()),
    "124M, 64 sequences, full checkpointing": ("model=gpt124m", 64, ("activation_checkpointing=full",)),
    "124M, 32 sequences, adamw_8bit": ("model=gpt124m", 32, ("optimizer=adamw_8bit",)),
    "774M, 16 sequences": ("model=gpt774m", 16, ()),
}
TINY = ("model=tiny", "tokenizer=byte", "data.sequence_length=64")


def cases(setup: Setup) -> list[Case]:
    """The cases, in the order of what they tell."""
    small = ["--rehearse"] if setup.rehearses else []
    model = TINY if setup.rehearses else ("model=gpt124m",)
    whole = ("model=gpt124m", "accumulation.batch_size=2048", "accumulation.micro_batch_size=2048")
    auto = ("accumulation=auto", f"accumulation.batch_size={8 if setup.rehearses else 1024}")
    large = TINY if setup.rehearses else ("model=gpt774m", *batch(8))
    return [
        worker("decoding", "decoding", *small, seconds=75, needs_gpu=False),
        worker("signals", "signals", *small, seconds=120, needs_gpu=False),
        train("real out of memory", *whole, *COMMON, *NO_SAVES, "loop.max_steps=2", seconds=90, read=read_halving),
        train("accumulation=auto", *model, *COMMON, *NO_SAVES, "loop.max_steps=2", *auto, seconds=90, needs_gpu=False),
        train("checkpoint stall", *large, *COMMON, "loop.max_steps=18", "checkpoint.every_steps=6",
              "checkpoint.keep_last=1", seconds=120, needs_gpu=False, read=read_stall),
        *(case for name, of in PLANNED.items() for case in planned(name, *of, setup)),
    ]  # fmt: skip


def batch(sequences: int) -> tuple[str, str]:
    """All sequences of a step at once."""
    return f"accumulation.batch_size={sequences}", f"accumulation.micro_batch_size={sequences}"


def planned(name: str, model: str, sequences: int, more: tuple[str, ...], setup: Setup) -> list[Case]:
    """A plan without a probe, and the run that it is for."""
    sizes = (*TINY, *batch(4)) if setup.rehearses else (model, *batch(sequences))
    overrides = (*sizes, *more, *COMMON, *NO_SAVES)
    path = setup.out / f"plan-{'-'.join(name.replace(',', '').split())}.json"
    plan = ("-m", "llmtrain", "plan", *overrides, "probe=false", f"json='{path}'")
    return [
        Case(f"plan: {name}", plan, seconds=60, needs_gpu=False),
        train(f"run: {name}", *overrides, seconds=60, needs_gpu=False, read=read_planned(path)),
    ]


def read_planned(path: Path) -> Callable[[Path, str, Row], list[Row]]:
    """A reader that puts the plan's figure beside the measured one."""

    def read(run: Path, output: str, row: Row) -> list[Row]:
        (row,) = read_run(run, output, row)
        expected = json.loads(path.read_text())["estimated_peak_bytes"]
        off = expected / row["memory_bytes"] - 1
        return [row | {"planned GB": expected / 1e9, "off by": f"{off:+.1%}"}]

    return read


def read_halving(run: Path, output: str, row: Row) -> list[Row]:
    """A run that ran out of memory, halved its micro-batch and went on."""
    (row,) = read_run(run, output, row)
    if row["status"] == "ok" and not any(event.startswith("out_of_memory") for event in row["events"]):
        row |= {"status": "failed", "problem": "memory did not run out"}
    return [row]


def read_stall(run: Path, output: str, row: Row) -> list[Row]:
    """Seconds that each save held training, and took."""
    (row,) = read_run(run, output, row)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    saves = [one for one in rows if one.get("event") == "save"]
    row["held s"] = ", ".join(f"{one['held_seconds']:.2f}" for one in saves)
    row["save s"] = ", ".join(f"{one['seconds']:.1f}" for one in saves)
    return [row]
