"""The cost and the gain of several processes on one machine: speed beside one process, memory by number of ranks.

python -m benchmarks.ranks               # both tables, into benchmarks/results; needs two quiet cores

Speed: two ranks of one thread beside one process of two threads, in turn in every round; the ratio is taken within a
round.  Memory: what each rank of an FSDP run holds of weights and optimizer state, by its files in a checkpoint, and
the peak of the resident set of rank 0, of which some 400 MB are torch itself.
"""

import argparse
import datetime
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.command_line import steps_of, train

COMMON = (
    "tokenizer=byte", "data=text", "data.path=text.txt", "data.sequence_length=256", "model=tiny",
    "model.context_length=256", "model.dropout=0.0", "loop.eval_every=0", "loop.sample_every=0", "metrics.log_every=1",
    "precision=fp32", "optimizer=adamw", "schedule=constant", "schedule.warmup_steps=0", "runtime.compile=false",
)  # fmt: skip
SPEED = (
    "model.num_layers=6", "model.hidden_size=256", "model.num_heads=4", "accumulation.batch_size=8",
    "accumulation.micro_batch_size=4", "checkpoint.every_steps=0",
)  # fmt: skip
MEMORY = (
    "model.num_layers=8", "model.hidden_size=768", "model.num_heads=12", "accumulation.batch_size=4",
    "accumulation.micro_batch_size=1", "checkpoint.every_steps=0", "loop.max_steps=2",
)  # fmt: skip
CONTESTANTS = {
    "one process": ("runtime.num_threads=2",),
    "ddp": ("runtime.num_threads=1", "distributed=ddp", "distributed.processes=2"),
    "fsdp": ("runtime.num_threads=1", "distributed=fsdp", "distributed.processes=2"),
}
WARM_UP = 3  # steps


def main() -> None:
    """Measure; print and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=13)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--date", default=datetime.datetime.now(datetime.UTC).date().isoformat())
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lines = (f"Line {number} of a text that is not long.\n" for number in range(20_000))
        (folder / "text.txt").write_text("".join(lines), encoding="utf-8")
        speeds = measure_speed(folder, arguments.rounds, arguments.steps)
        memory = [measure_memory(folder, ranks) for ranks in (1, 2, 4)]
    result = {"speeds": speeds, "memory": memory}
    path = arguments.output / f"{arguments.date}-ranks"
    path.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    text = page(arguments.date, speeds, memory)
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


def measure_speed(folder: Path, rounds: int, steps: int) -> dict[str, list[float]]:
    """Tokens per second of each contestant, a number a round."""
    speeds: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    for number in range(rounds):
        names = list(CONTESTANTS)[number % len(CONTESTANTS) :] + list(CONTESTANTS)[: number % len(CONTESTANTS)]
        for name in names:
            run = train(
                folder, f"speed-{name}-{number}", [*COMMON, *SPEED, f"loop.max_steps={steps}", *CONTESTANTS[name]]
            )
            rates = [row["tokens_per_second"] for row in steps_of(run)[WARM_UP:]]
            speeds[name].append(statistics.median(rates))
            print(f"round {number + 1} {name:>12}: {speeds[name][-1]:,.0f} tokens/s", flush=True)
    return speeds


def measure_memory(folder: Path, ranks: int) -> dict[str, Any]:
    """Bytes that the ranks of an FSDP run hold."""
    mode = ("distributed=fsdp", f"distributed.processes={ranks}") if ranks > 1 else ()
    run = train(folder, f"memory-{ranks}", [*COMMON, *MEMORY, "runtime.num_threads=1", *mode])
    checkpoint = next((run / "checkpoints").iterdir())
    held = {
        group: [path.stat().st_size for path in sorted(checkpoint.glob(f"{group}*.safetensors"))]
        for group in ("model", "optimizer")
    }
    peak = max(row["memory_bytes"] for row in steps_of(run))
    print(f"{ranks} ranks: {held}, peak {peak / 1e6:,.0f} MB", flush=True)
    return {"ranks": ranks, **held, "peak": peak}


def page(date: str, speeds: dict[str, list[float]], memory: list[dict[str, Any]]) -> str:
    """Both tables as Markdown."""
    lines = [
        f"# Several processes on one machine, {date}", "",
        f"`python -m benchmarks.ranks`: two ranks of one thread beside one process of two threads, gloo, fp32, medians "
        f"of {len(speeds['one process'])} rounds.", "",
        "| | tokens/s | of one process (range) |", "|---|---|---|",
    ]  # fmt: skip
    for name, rates in speeds.items():
        ratios = [rate / one for rate, one in zip(rates, speeds["one process"], strict=True)]
        lines.append(f"| {name} | {statistics.median(rates):,.0f} | {statistics.median(ratios):.2f} ({min(ratios):.2f} "
                     f"to {max(ratios):.2f}) |")  # fmt: skip
    lines += [
        "",
        "FSDP: the largest part that a rank holds, by its files in a checkpoint, and rank 0's peak resident set.", "",
        "| ranks | weights, MB | optimizer state, MB | of one process | peak, MB |", "|---|---|---|---|---|",
    ]  # fmt: skip
    whole = sum(memory[0]["model"]) + sum(memory[0]["optimizer"])
    for row in memory:
        model, optimizer = max(row["model"]), max(row["optimizer"])
        share = (model + optimizer) / whole
        lines.append(f"| {row['ranks']} | {model / 1e6:.1f} | {optimizer / 1e6:.1f} | {share:.3f} "
                     f"| {row['peak'] / 1e6:,.0f} |")  # fmt: skip
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
