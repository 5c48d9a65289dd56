"""The same run on one process and on several: losses and gradient norms of every step.

python -m benchmarks.same_numbers                                # all modes and cases, into benchmarks/results
python -m benchmarks.same_numbers --modes fsdp tensor --cases llama

Each case is trained by one process first, in fp32 without dropout, then in every mode through the command line.  A
deviation is the largest of all steps, relative to the one process's value.  The modes of 4 ranks need 4 processes on
this machine, not 4 cores.
"""

import argparse
import datetime
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.command_line import RunFailed, rows_of, steps_of, train

GOOD = 1e-5  # wanted of each step
COMMON = (
    "data.sequence_length=64", "loop.eval_every=20", "loop.eval_batches=4", "loop.sample_every=0",
    "accumulation.batch_size=8", "accumulation.micro_batch_size=2", "metrics.log_every=1", "precision=fp32",
    "optimizer=adamw", "optimizer.lr=1e-3", "schedule=constant", "schedule.warmup_steps=0", "checkpoint.every_steps=0",
    "runtime.num_threads=1", "runtime.compile=false", "model.dropout=0.0",
)  # fmt: skip
TEXT = ("tokenizer=byte", "data=text", "data.path=text.txt")
GPT = ("model=tiny", "model.num_layers=4", "model.hidden_size=32", "model.num_heads=4", "model.context_length=64")
LLAMA = (
    "model=llama_tiny", "model.num_layers=4", "model.hidden_size=32", "model.num_heads=4", "model.num_kv_heads=2",
    "model.context_length=64",
)  # fmt: skip
CASES = {
    "gpt": (*GPT, *TEXT),
    "llama": (*LLAMA, *TEXT),
    "lora": (*LLAMA, *TEXT, "lora=lora", "lora.rank=4", "lora.dropout=0.0", "weights=checkpoint", "weights.path=base"),
    "instruction": (*LLAMA, "tokenizer=byte", "data=instruction", "objective=instruction", "data.template=alpaca",
                    "data.pack=false", "data.path=instructions.jsonl", "data.sequence_length=256",
                    "model.context_length=256"),
}  # fmt: skip
PIPELINE = ("distributed=pipeline",)
MODES: dict[str, tuple[int, tuple[str, ...]]] = {  # name -> ranks, overrides
    "ddp": (2, ("distributed=ddp",)),
    "ddp, 4": (4, ("distributed=ddp",)),
    "fsdp": (2, ("distributed=fsdp",)),
    "fsdp, 4": (4, ("distributed=fsdp",)),
    "hsdp 2×2": (4, ("distributed=hsdp", "distributed.shard=2")),
    "tensor": (2, ("distributed=tensor",)),
    "tensor 2 × fsdp 2": (4, ("distributed=tensor", "distributed.tensor=2", "distributed.shard=2")),
    "pipeline gpipe": (2, (*PIPELINE, "distributed.pipeline_schedule=gpipe")),
    "pipeline 1f1b": (2, PIPELINE),
    "pipeline interleaved": (
        2, (*PIPELINE, "distributed.pipeline_schedule=interleaved", "distributed.stages_per_process=2"),
    ),
    "pipeline zero bubble": (
        2, (*PIPELINE, "distributed.pipeline_schedule=zero_bubble", "distributed.stages_per_process=2"),
    ),
    "pipeline 2 × fsdp 2": (4, ("distributed=pipeline", "distributed.pipeline=2", "distributed.shard=2")),
    "pipeline, 4": (4, PIPELINE),
    "context": (2, ("distributed=fsdp", "distributed.shard=1", "distributed.context=2")),
    "context 2 × fsdp 2": (4, ("distributed=fsdp", "distributed.shard=2", "distributed.context=2")),
    "deepspeed ZeRO-1": (2, ("distributed=deepspeed", "distributed.zero_stage=1")),
    "deepspeed ZeRO-2": (2, ("distributed=deepspeed", "distributed.zero_stage=2")),
    "deepspeed ZeRO-3": (2, ("distributed=deepspeed", "distributed.zero_stage=3")),
}  # fmt: skip


def main() -> None:
    """Run what is asked for; print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--date", default=datetime.datetime.now(datetime.UTC).date().isoformat())
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder)
        if "lora" in arguments.cases:
            numbers(folder, "base", [*CASES["llama"], "loop.max_steps=1"])
        for case in arguments.cases:
            steps = f"loop.max_steps={arguments.steps}"
            alone = numbers(folder, case, [*CASES[case], steps])
            for mode in arguments.modes:
                ranks, overrides = MODES[mode]
                words = [*CASES[case], steps, *overrides, f"distributed.processes={ranks}"]
                try:
                    result = compare(alone, numbers(folder, f"{case}-{mode}", words))
                except RunFailed as error:
                    result = {"error": str(error)}
                rows.append({"case": case, "mode": mode, "ranks": ranks} | result)
                print(json.dumps(rows[-1], ensure_ascii=False), flush=True)
    write(arguments, rows)


def write_data(folder: Path) -> None:
    """A text, and instructions whose answers differ in length."""
    lines = (f"Line {number} of a text that is not long.\n" for number in range(2000))
    (folder / "text.txt").write_text("".join(lines), encoding="utf-8")
    questions = (
        {"instruction": f"Count {n % 9} from {n}.", "input": "", "output": " ".join(map(str, range(n, n + n % 9 + 1)))}
        for n in range(400)
    )
    text = "".join(json.dumps(question) + "\n" for question in questions)
    (folder / "instructions.jsonl").write_text(text, encoding="utf-8")


def numbers(folder: Path, name: str, overrides: Sequence[str]) -> dict[str, Any]:
    """The rows of a run's steps and of its evaluations."""
    run = train(folder, name, [*COMMON, *overrides])
    return {"steps": steps_of(run), "validations": [row for row in rows_of(run) if "val_loss" in row]}


def compare(alone: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """The largest relative deviations of a run, and the steps in which both had the same data."""
    pairs = list(zip(alone["steps"], found["steps"], strict=True))
    scores = list(zip(alone["validations"], found["validations"], strict=True))
    same = sum(one["position"] == other["position"] and one["tokens"] == other["tokens"] for one, other in pairs)
    return {
        "loss": max(deviation(one, other, "loss") for one, other in pairs),
        "grad_norm": max(deviation(one, other, "grad_norm") for one, other in pairs),
        "val_loss": max(deviation(one, other, "val_loss") for one, other in scores),
        "same_data": same, "steps": len(pairs),
    }  # fmt: skip


def deviation(one: dict[str, Any], other: dict[str, Any], key: str) -> float:
    """Of one value, relative to the first."""
    return abs(other[key] - one[key]) / abs(one[key])


def write(arguments: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Write rows and table."""
    name = f"{arguments.date}-same-numbers"
    (arguments.output / f"{name}.json").write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
    text = page(arguments.date, arguments.steps, rows)
    (arguments.output / f"{name}.md").write_text(text, encoding="utf-8")
    print(text)


def page(date: str, steps: int, rows: list[dict[str, Any]]) -> str:
    """The table as Markdown."""
    lines = [
        f"# The same run on one process and on several, {date}", "",
        f"`python -m benchmarks.same_numbers`: {steps} steps of AdamW in fp32, gloo on a CPU. Deviations are the "
        f"largest of all steps, relative to one process; wanted are {GOOD:g}.", "",
        "| case | mode | ranks | loss | gradient norm | validation loss | steps with the same data |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in rows:
        head = f"| {row['case']} | {row['mode']} | {row['ranks']} |"
        if "error" in row:
            lines.append(f"{head} {row['error']} | | | |")
            continue
        marks = ["" if row[key] <= GOOD else " **too much**" for key in ("loss", "grad_norm", "val_loss")]
        figures = " | ".join(
            f"{row[key]:.1e}{mark}" for key, mark in zip(("loss", "grad_norm", "val_loss"), marks, strict=True)
        )
        lines.append(f"{head} {figures} | {row['same_data']} of {row['steps']} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
