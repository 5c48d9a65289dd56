"""``plan`` for clusters beside published runs: time of a step and memory.

python -m benchmarks.plan_cluster          # the table, into benchmarks/results
python -m benchmarks.plan_cluster --fit    # the fitted rates from the rows that are used for it
"""

import argparse
import datetime
import json
import math
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.published_runs import PublishedRun, published_runs
from llmtrain.base.gpus import GPUS
from llmtrain.plan.rank_memory import rank_memory
from llmtrain.plan.rates import RATES, Rates, attention_share, matmul_share
from llmtrain.plan.step_time import Engine, StepTime, step_time

GOOD, BOUND = 0.15, 0.30  # wanted of the time of a step: on most rows, on all
# The range that the fit searches.
RANGES = {
    "product_size": (0.0, 600.0), "eager_traffic": (1.0, 6.0), "power_exponent": (0.5, 1.5), "contention": (0.0, 0.6),
    "jitter": (0.0, 0.015),
}  # fmt: skip


def main() -> None:
    """Write the table, or print fitted rates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", action="store_true", help="search the fitted rates; write nothing")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--date", default=datetime.datetime.now(datetime.UTC).date().isoformat())
    arguments = parser.parse_args()
    runs = published_runs()
    if arguments.fit:
        print(fit([run for run in runs if run.is_wanted]))
        return
    rows = [compare(run) for run in runs]
    name = f"{arguments.date}-plan-cluster"
    result = {"rates": asdict(RATES), "rows": rows}
    (arguments.output / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    text = page(arguments.date, rows)
    (arguments.output / f"{name}.md").write_text(text, encoding="utf-8")
    print(text)


def predict(run: PublishedRun, rates: Rates = RATES) -> StepTime:
    """Estimate the step of a published run."""
    gpu = GPUS[run.device]
    peak = gpu.flops["bf16"] * run.peak_scale
    engine = Engine(
        peak * matmul_share(run.device), peak * attention_share(run.device), run.bandwidth or gpu.bandwidth, run.power
    )  # fmt: skip
    return step_time(run.shape, run.mesh, run.work, run.program, engine, run.links, rates)


def published_seconds(run: PublishedRun) -> float:
    """The time of a step that the published speed means."""
    tokens = run.work.tokens * run.work.micro_batches * run.mesh.data
    return tokens / (run.tokens_per_second * run.mesh.devices)


def compare(run: PublishedRun) -> dict[str, Any]:
    """Return what was published and what is predicted."""
    time, wanted = predict(run), published_seconds(run)
    memory = rank_memory(run.shape, run.mesh, run.work, run.program)
    gib = memory.peak / 2**30
    return {
        "name": run.name,
        "source": run.source,
        "is_fitted": run.is_wanted,
        "published_tokens_per_second": run.tokens_per_second,
        "predicted_tokens_per_second": run.tokens_per_second * wanted / time.seconds,
        "published_seconds": wanted,
        "predicted_seconds": time.seconds,
        "error": time.seconds / wanted - 1,
        "published_gib": run.memory_gib,
        "predicted_gib": gib,
        "fits": memory.peak <= GPUS[run.device].memory_bytes,
        "memory_error": None if run.memory_gib is None else gib / run.memory_gib - 1,
        "seconds": dict(time.parts),
        "memory_bytes": dict(memory.parts),
    }


def fit(runs: list[PublishedRun], *, trials: int = 3000, seed: int = 0) -> dict[str, float]:
    """Search the rates with the least squared logarithm of predicted over published time, at random around the best."""
    generator = np.random.default_rng(seed)
    low, high = (np.array([limits[side] for limits in RANGES.values()]) for side in (0, 1))

    def loss(values: np.ndarray) -> float:
        rates = Rates(**dict(zip(RANGES, values.tolist(), strict=True)))
        return statistics.mean(math.log(predict(run, rates).seconds / published_seconds(run)) ** 2 for run in runs)

    best = (low + high) / 2
    least, width = loss(best), (high - low) / 4
    for trial in range(trials):
        moved = generator.random(len(best)) < 0.5
        values = np.clip(best + generator.normal(size=len(best)) * width * moved, low, high)
        if (found := loss(values)) < least:
            best, least = values, found
        if trial % 400 == 399:
            width *= 0.6
    return dict(zip(RANGES, np.round(best, 4).tolist(), strict=True)) | {"root_mean_square": round(least**0.5, 4)}


def page(date: str, rows: list[dict[str, Any]]) -> str:
    """Format both tables and what they come to."""
    fitted = [row for row in rows if row["is_fitted"]]
    others = [row for row in rows if not row["is_fitted"]]
    unknown = [row for row in rows if row["published_gib"] is None]
    rates = ", ".join(f"{name} {value:g}" for name, value in asdict(RATES).items())
    lines = [
        f"# `plan` for clusters against published runs, {date}",
        "",
        f"One set of rates for all rows: {rates}. Wanted: time of a step within {GOOD:.0%} on most rows and within "
        f"{BOUND:.0%} on all, memory within 10%. Sources, settings and assumptions: `benchmarks/published_runs.py`.",
        "",
        "## Rows that the rates are fitted to",
        "",
        summary(fitted),
        "",
        *table(fitted),
        "",
        "## Rows that were not used",
        "",
        summary(others),
        "",
        *table(others),
        "",
        "Memory: KempnerForge publishes allocated GiB, torchtitan reserved ones, with the allocator's gaps; the "
        "prediction is of tensors. llm-foundry publishes none, but its runs fitted into their GPUs: so does the "
        f"prediction on {sum(row['fits'] for row in unknown)} of {len(unknown)} of them.",
        "",
    ]  # fmt: skip
    return "\n".join(lines)


def summary(rows: list[dict[str, Any]]) -> str:
    """The counts of a table in a sentence."""
    errors = [abs(row["error"]) for row in rows]
    memory = [abs(row["memory_error"]) for row in rows if row["memory_error"] is not None]
    good = sum(error <= GOOD for error in errors)
    within = sum(error <= 0.10 for error in memory)
    return (
        f"{good} of {len(rows)} within {GOOD:.0%}, the largest error {max(errors):.1%}, the median "
        f"{statistics.median(errors):.1%}; memory within 10% on {within} of {len(memory)}."
    )


def table(rows: list[dict[str, Any]]) -> list[str]:
    """A Markdown table of rows."""
    lines = [
        "| run | tokens/s a GPU, published | predicted | step, s | predicted | error | GiB | predicted | error |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        memory = ["", f"{row['predicted_gib']:.1f}", ""]
        if row["published_gib"] is not None:
            memory = [f"{row['published_gib']:.1f}", memory[1], f"{row['memory_error']:+.1%}"]
        cells = [
            row["name"], f"{row['published_tokens_per_second']:,.0f}", f"{row['predicted_tokens_per_second']:,.0f}",
            f"{row['published_seconds']:.3f}", f"{row['predicted_seconds']:.3f}", f"{row['error']:+.1%}", *memory,
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    main()
