"""Whether each optimisation keeps the loss curve: the same runs with and without it, beside the noise of the seed."""

import argparse
import datetime
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

RECIPE = ("experiment=laptop_gpt2", "precision=fp32", "runtime.compile=false", "loop.max_steps=200",
          "loop.eval_every=200", "loop.eval_batches=16", "loop.sample_every=0", "metrics.log_every=1",
          "checkpoint.every_steps=0", "plugins=[benchmarks]")  # fmt: skip
PLAIN = ("objective._target_=benchmarks.plain.PlainLoss", "optimizer._target_=benchmarks.plain.UnfusedAdamW")
# name -> what is added to the recipe; the first is the reference, with nothing optimised
VARIANTS = {
    "plain": PLAIN,
    "fused AdamW": PLAIN[:1],
    "loss in chunks": PLAIN[1:],
    "both": (),
    "compiled": ("runtime.compile=true",),
    "bf16": ("precision=bf16",),
    "bf16, torch's attention": ("precision=bf16", "model._target_=benchmarks.plain.TorchAttention"),
    "bf16, compiled": ("precision=bf16", "runtime.compile=true"),
    "checkpointing=selective": ("activation_checkpointing=selective",),
    "checkpointing=full": ("activation_checkpointing=full",),
    "micro-batches of 3": ("accumulation.micro_batch_size=3",),
    "adamw_8bit": ("optimizer=adamw_8bit", "optimizer.lr=2e-3"),
    "adamw_bf16": ("optimizer=adamw_bf16", "optimizer.lr=2e-3"),
}


def main() -> None:
    """Run the variants with every seed; print a table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--overrides", nargs="*", default=[], help="added to every run")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    curves: dict[str, dict[int, list[float]]] = {}
    ends: dict[str, dict[int, float]] = {}
    for seed in arguments.seeds:
        for name in dict.fromkeys(["plain", *arguments.variants]):
            curve, end = train(name, seed, arguments.overrides)
            curves.setdefault(name, {})[seed], ends.setdefault(name, {})[seed] = curve, end
            print(f"seed {seed} {name:>24}: validation loss {end:.4f}", flush=True)
    report(arguments, curves, ends)


def train(name: str, seed: int, overrides: list[str]) -> tuple[list[float], float]:
    """The training loss of every step and the last validation loss of one run, in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "llmtrain", "train", *RECIPE, *VARIANTS[name], f"runtime.seed={seed}",
                   f"run_dir={folder}/run", *overrides]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
        if done.returncode:
            sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
        rows = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row and "event" not in row]
    return losses, [row["val_loss"] for row in rows if "val_loss" in row][-1]


def distance(one: list[float], other: list[float]) -> float:
    """Mean distance of two curves."""
    return statistics.fmean(abs(a - b) for a, b in zip(one, other, strict=True))


def report(
    arguments: argparse.Namespace, curves: dict[str, dict[int, list[float]]], ends: dict[str, dict[int, float]]
) -> None:
    """A table on the terminal, and both files of the results."""
    import torch

    from llmtrain.base.device import device_name

    seeds = arguments.seeds
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pairs = [(a, b) for i, a in enumerate(seeds) for b in seeds[i + 1 :]]
    plain = curves["plain"]
    noise = [distance(plain[a], plain[b]) for a, b in pairs]
    lines = [
        f"# The same curve, {datetime.date.today().isoformat()}",
        "",
        f"{device_name(device)}, torch {torch.__version__}. `{' '.join((*RECIPE, *arguments.overrides))}`, "
        f"seeds {', '.join(map(str, seeds))}.",
        "",
        "Distance: mean over the steps of the absolute difference of two training losses, between a variant and the "
        "plain run of the same seed; below it the largest at any step. "
        + (f"Plain runs of two seeds are {min(noise):.4f} to {max(noise):.4f} apart." if noise else ""),
        "",
        "| variant | mean distance | largest | last training loss, mean of the last 10 | validation loss by seed |",
        "|---|---|---|---|---|",
    ]
    for name, by_seed in curves.items():
        mean = statistics.fmean(distance(by_seed[seed], plain[seed]) for seed in seeds)
        largest = max(abs(a - b) for seed in seeds for a, b in zip(by_seed[seed], plain[seed], strict=True))
        last = statistics.fmean(statistics.fmean(by_seed[seed][-10:]) for seed in seeds)
        values = ", ".join(f"{ends[name][seed]:.4f}" for seed in seeds)
        lines.append(f"| {name} | {mean:.2g} | {largest:.2g} | {last:.4f} | {values} |")
    text = "\n".join(lines) + "\n"
    print("\n" + text)
    arguments.output.mkdir(parents=True, exist_ok=True)
    stem = f"{datetime.date.today().isoformat()}-same-curve-{device.type}"
    (arguments.output / f"{stem}.md").write_text(text)
    (arguments.output / f"{stem}.json").write_text(json.dumps({"curves": curves, "ends": ends}) + "\n")


if __name__ == "__main__":
    main()
