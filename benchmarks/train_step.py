"""Steady-state training speed, ours beside nanoGPT's: paired, interleaved, each measurement in a fresh process."""

import argparse
import datetime
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

WARM_UP = 3  # steps left out of each measurement


def main() -> None:
    """Measure every mode with every contestant, in turns; print a table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT to measure beside")
    parser.add_argument(
        "--modes", nargs="+", default=["bf16", "fp32"], help="of: bf16 fp32 bf16-compiled fp32-compiled"
    )
    parser.add_argument("--model", default="gpt124m")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8, help="measured steps a process")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--worker", choices=["llmtrain", "nanogpt"], help=argparse.SUPPRESS)
    parser.add_argument("--mode", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        measure = measure_llmtrain if arguments.worker == "llmtrain" else measure_nanogpt
        print("RESULT " + json.dumps(measure(arguments)))
        return
    contestants = ["llmtrain", *(["nanogpt"] if arguments.nanogpt else [])]
    results: dict[str, dict[str, list[dict[str, Any]]]] = {
        mode: {contestant: [] for contestant in contestants} for mode in arguments.modes
    }
    for number in range(arguments.rounds):
        for mode in arguments.modes:
            for contestant in contestants if number % 2 == 0 else reversed(contestants):
                measured = run_worker(contestant, mode)
                results[mode][contestant].append(measured)
                print(
                    f"round {number + 1} {mode:>13} {contestant:>8}: {measured['tokens_per_second']:.0f} tok/s",
                    flush=True,
                )
    report(arguments, results)


def run_worker(contestant: str, mode: str) -> dict[str, Any]:
    """One measurement in a fresh process."""
    command = [sys.executable, __file__, *sys.argv[1:], "--worker", contestant, "--mode", mode]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        sys.exit(f"{contestant} {mode} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads(lines[-1].removeprefix("RESULT "))


def result(step_seconds: list[float], tokens: int, extra: dict[str, Any]) -> dict[str, Any]:
    """Median throughput over the measured steps."""
    seconds = statistics.median(step_seconds)
    return {"tokens_per_second": tokens / seconds, "step_seconds": seconds, **extra}


def measure_llmtrain(arguments: argparse.Namespace) -> dict[str, Any]:
    """A real run of ours, read from its metrics."""
    from llmtrain.runtime import prepare_process

    prepare_process()  # as the command does
    from llmtrain import Run
    from llmtrain.metrics import read_metrics

    precision, _, compiled = arguments.mode.partition("-")
    with tempfile.TemporaryDirectory() as folder:
        run = Run.compose(
            f"model={arguments.model}", f"model.context_length={arguments.context}", f"precision={precision}",
            f"accumulation.batch_size={arguments.batch_size}", f"accumulation.micro_batch_size={arguments.batch_size}",
            f"loop.max_steps={WARM_UP + arguments.steps}", "loop.eval_every=0", "loop.sample_every=0",
            "metrics.log_every=1", "checkpoint.every_steps=0", f"runtime.compile={bool(compiled)}",
            f"output_dir={folder}",
        )  # fmt: skip
        result_of_run = run.train()
        rows = [
            row for row in read_metrics(result_of_run.run_dir / "metrics.jsonl") if "loss" in row and "event" not in row
        ]
    seconds = [row["step_seconds"] for row in rows[WARM_UP:]]
    tokens = arguments.batch_size * arguments.context
    memory = rows[-1]["memory_bytes"] / 1e9
    return result(seconds, tokens, {"memory_gb": memory, "mfu": statistics.median(r["mfu"] for r in rows[WARM_UP:])})


def measure_nanogpt(arguments: argparse.Namespace) -> dict[str, Any]:
    """nanoGPT's model and optimizer in the loop of its ``train.py``, with autocast on a CPU too."""
    import contextlib
    import resource
    import time

    import torch

    sys.path.insert(0, str(arguments.nanogpt))
    from model import GPT, GPTConfig

    precision, _, compiled = arguments.mode.partition("-")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(1337)
    torch.backends.cuda.matmul.allow_tf32 = True
    context = torch.autocast(device, torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()
    config = GPTConfig(
        block_size=arguments.context, vocab_size=50304, n_layer=12, n_head=12, n_embd=768, dropout=0.0, bias=True
    )
    model = GPT(config).to(device)
    optimizer = model.configure_optimizers(0.1, 3e-4, (0.9, 0.95), device)
    step_model = torch.compile(model) if compiled else model
    shape = (arguments.batch_size, arguments.context + 1)
    seconds = []
    for _ in range(WARM_UP + arguments.steps):
        start = time.perf_counter()
        tokens = torch.randint(50257, shape).to(device)
        with context:
            _, loss = step_model(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
        seconds.append(time.perf_counter() - start)
    on_gpu = device == "cuda"
    memory = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return result(seconds[WARM_UP:], arguments.batch_size * arguments.context, {"memory_gb": memory / 1e9})


def report(arguments: argparse.Namespace, results: dict[str, dict[str, list[dict[str, Any]]]]) -> None:
    """A table on the terminal, and both files of the results."""
    import torch

    from llmtrain.runtime import device_name

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine = device_name(device)
    lines = [
        f"# Training step, {datetime.date.today().isoformat()}",
        "",
        f"{machine}, torch {torch.__version__}. {arguments.model}, context {arguments.context}, "
        f"{arguments.batch_size * arguments.context} tokens a step, AdamW, clipping 1.0; medians of {arguments.steps} "
        f"steps in each of {arguments.rounds} processes (range over the processes).",
        "",
        "| mode | contestant | tok/s | range | peak memory, GB | MFU | ours is faster by |",
        "|---|---|---|---|---|---|---|",
    ]
    for mode, by_contestant in results.items():
        ours = statistics.median(r["tokens_per_second"] for r in by_contestant["llmtrain"])
        for contestant, measured in by_contestant.items():
            rates = [r["tokens_per_second"] for r in measured]
            median, memory = statistics.median(rates), statistics.median(r["memory_gb"] for r in measured)
            mfu = f"{statistics.median(r['mfu'] for r in measured):.0%}" if "mfu" in measured[0] else ""
            faster = f"{ours / median:.2f} ×" if contestant != "llmtrain" else ""
            spread = f"{min(rates):.0f}–{max(rates):.0f}"
            lines.append(f"| {mode} | {contestant} | {median:.0f} | {spread} | {memory:.1f} | {mfu} | {faster} |")
    text = "\n".join(lines) + "\n"
    print("\n" + text)
    arguments.output.mkdir(parents=True, exist_ok=True)
    stem = f"{datetime.date.today().isoformat()}-train-step-{device.type}"
    (arguments.output / f"{stem}.md").write_text(text)
    record = {"machine": machine, "torch": torch.__version__, "results": results}
    (arguments.output / f"{stem}.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
