"""What saving costs training: blocks of steps with no save, one behind training's back, and one that it waits for.

The three kinds of blocks take turns in one process, on the same model; a block's save falls on its first step.
"""

import argparse
import contextlib
import datetime
import io
import json
import statistics
import tempfile
import time
from pathlib import Path

MODES = ("none", "asynchronous", "synchronous")
WARM_UP = 3  # steps left out


def main() -> None:
    """Measure, print the table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="gpt124m")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--steps", type=int, default=20, help="steps between two saves")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--folder", type=Path, help="where the checkpoints are written (default: a temporary folder)")
    arguments = parser.parse_args()
    from llmtrain.runtime import prepare_process

    prepare_process()  # as the command does
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        report(arguments, *measure(arguments, Path(folder)))


def measure(arguments: argparse.Namespace, folder: Path) -> tuple[dict[str, list[dict[str, float]]], int, str]:
    """Seconds of each block, with what its save held training for and took in all; bytes of a checkpoint; machine."""
    import torch

    from llmtrain import Run
    from llmtrain.display import PlainDisplay
    from llmtrain.metrics import read_metrics
    from llmtrain.run_directory import RunDirectory
    from llmtrain.runtime import device_name
    from llmtrain.saver import Saver
    from llmtrain.state import TrainState

    run = Run.compose(
        f"model={arguments.model}", f"model.context_length={arguments.context}", f"precision={arguments.precision}",
        f"accumulation.batch_size={arguments.batch_size}", f"accumulation.micro_batch_size={arguments.batch_size}",
        "loop.max_steps=1000000", "checkpoint.keep_last=2", "metrics.log_every=1000000",
    )  # fmt: skip
    directory = RunDirectory(folder)
    directory.config.write_text("name: benchmark\n")
    results: dict[str, list[dict[str, float]]] = {mode: [] for mode in MODES}
    with contextlib.ExitStack() as stack:
        device = stack.enter_context(run.runtime.session())
        run.runtime.seed_everything()
        parts = run.assemble(device)
        stack.enter_context(parts.precision.arithmetic())
        saver = stack.enter_context(Saver(run.checkpoint, directory, device))
        loop = run.make_loop(
            parts, directory, TrainState(data=parts.corpus.fingerprint),
            metrics=stack.enter_context(run.metrics.build(folder, resume_step=None)),
            display=PlainDisplay(folder, io.StringIO()), saver=saver, peak_flops=1.0, stop=lambda: None,
        )  # fmt: skip
        stack.enter_context(contextlib.closing(loop))
        loop.model.train()

        def synchronize() -> None:
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        for mode in ("synchronous", "asynchronous"):  # the first of each touches fresh memory and disk
            block(loop, saver, mode, WARM_UP, synchronize)
        for number in range(arguments.rounds):
            for mode in MODES if number % 2 == 0 else reversed(MODES):
                seconds = block(loop, saver, mode, arguments.steps, synchronize)
                saves = [row for row in read_metrics(directory.metrics) if row.get("event") == "save"]
                entry = {"seconds": seconds}
                if mode != "none":
                    entry |= {"held_seconds": saves[-1]["held_seconds"], "save_seconds": saves[-1]["seconds"]}
                results[mode].append(entry)
                print(
                    f"round {number + 1} {mode:>12}: " + ", ".join(f"{k} {v:.3f}" for k, v in entry.items()), flush=True
                )
        return results, run.checkpoint_bytes(parts), device_name(device)


def block(loop, saver, mode: str, steps: int, synchronize) -> float:  # type: ignore[no-untyped-def]
    """Seconds that ``steps`` steps take, a save of the kind begun with the first; its end is not waited for."""
    loop.settle(wait=True)
    saver.is_behind = mode == "asynchronous"
    synchronize()
    start = time.perf_counter()
    for step in range(steps):
        if step == 0 and mode != "none":
            loop.save()
        loop.advance()
    synchronize()
    seconds = time.perf_counter() - start
    loop.settle(wait=True)
    return seconds


def report(
    arguments: argparse.Namespace, results: dict[str, list[dict[str, float]]], checkpoint_bytes: int, machine: str
) -> None:
    """A table on the terminal, and both files of the results."""
    import torch

    def median(mode: str, key: str) -> float:
        return statistics.median(entry[key] for entry in results[mode])

    base = median("none", "seconds")
    lines = [
        f"# Cost of a checkpoint, {datetime.date.today().isoformat()}",
        "",
        f"{machine}, torch {torch.__version__}. {arguments.model} with AdamW, {checkpoint_bytes / 1e9:.2f} GB a "
        f"checkpoint, {arguments.batch_size * arguments.context} tokens a step, one save every {arguments.steps} "
        f"steps; medians of {arguments.rounds} blocks of each kind, in turns in one process.",
        "",
        "| save | block, s | range | overhead | training held, s | save in all, s |",
        "|---|---|---|---|---|---|",
    ]
    for mode in MODES:
        seconds = [entry["seconds"] for entry in results[mode]]
        overhead = f"{median(mode, 'seconds') / base - 1:+.1%}" if mode != "none" else ""
        held = f"{median(mode, 'held_seconds'):.3f}" if mode != "none" else ""
        whole = f"{median(mode, 'save_seconds'):.2f}" if mode != "none" else ""
        spread = f"{min(seconds):.2f}–{max(seconds):.2f}"
        lines.append(f"| {mode} | {statistics.median(seconds):.2f} | {spread} | {overhead} | {held} | {whole} |")
    held = median("asynchronous", "held_seconds") / median("synchronous", "held_seconds")
    lines += ["", f"Training is held for {held:.1%} of the time that a synchronous save takes."]
    text = "\n".join(lines) + "\n"
    print("\n" + text)
    arguments.output.mkdir(parents=True, exist_ok=True)
    stem = f"{datetime.date.today().isoformat()}-checkpoint-cost-{'cuda' if torch.cuda.is_available() else 'cpu'}"
    (arguments.output / f"{stem}.md").write_text(text)
    record = {"machine": machine, "torch": torch.__version__, "bytes": checkpoint_bytes, "results": results}
    (arguments.output / f"{stem}.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
