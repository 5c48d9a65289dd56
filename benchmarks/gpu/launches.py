"""Kernel launches and bytes of a training step by phase, without a GPU.

    python -m benchmarks.gpu.launches                                    # 124M and 1558M, and what else CASES holds
    python -m benchmarks.gpu.launches --overrides model=gpt124m optimizer=adamw_8bit
    python -m benchmarks.gpu.launches --checkout DIR --output FILE.json  # of another checkout, into the same table

The step is ``Loop.train_step`` of the checkout: forward, backward, clipping, judging and update, on tensors without
data that are on "cuda" (:mod:`benchmarks.gpu.counter` says how they count).  The loader, a checkpoint's copy and
reading the step's numbers back are left out.  The second step is counted; the first makes what stays.
"""

import argparse
import datetime
import json
import multiprocessing
import subprocess
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PHASES = ("forward", "backward", "clipping", "update")
SMALL = ("model=gpt124m", "precision=bf16", "accumulation.batch_size=32", "accumulation.micro_batch_size=32")
LARGE = ("model=gpt1558m", "precision=bf16", "accumulation.batch_size=16", "accumulation.micro_batch_size=16")
CASES = {
    "124M": SMALL,
    "124M, 2 micro-batches": (*SMALL, "accumulation.micro_batch_size=16"),
    "124M, fp16": (*SMALL, "precision=fp16"),
    "124M, adamw_8bit": (*SMALL, "optimizer=adamw_8bit"),
    "124M, adamw_bf16": (*SMALL, "optimizer=adamw_bf16"),
    "124M, muon": (*SMALL, "optimizer=muon"),
    "124M, clipping=none": (*SMALL, "clipping=none"),
    "1558M": LARGE,
    "1558M, adamw_8bit": (*LARGE, "optimizer=adamw_8bit"),
    "1558M, adamw_bf16": (*LARGE, "optimizer=adamw_bf16"),
}


def main() -> None:
    """Count the chosen cases; print a table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--overrides", nargs="+", help="one case of these, in place of --cases")
    parser.add_argument("--checkout", type=Path, default=ROOT, help="folder whose llmtrain is counted; default: this")
    parser.add_argument("--name", help="of the checkout in the table; default: its commit")
    parser.add_argument("--output", type=Path, help="JSON file that gets the rows, and a table .md beside it")
    arguments = parser.parse_args()
    import torch

    if torch.backends.cuda.is_built() and not torch.cuda.is_available():
        parser.error("torch is built with CUDA, and there is no GPU: a build of torch for CPUs is needed, or a GPU")
    checkout = arguments.checkout.resolve()
    name = arguments.name or commit_of(checkout)
    cases = {" ".join(arguments.overrides): arguments.overrides} if arguments.overrides else CASES
    # a process for each case: what is compiled once in a process would be counted in the first alone
    processes = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), max_tasks_per_child=1)
    for case in cases if arguments.overrides else arguments.cases:
        figures_of_case = processes.submit(count, checkout, cases[case]).result()
        row = {"case": case, "commit": name, "overrides": list(cases[case])} | figures_of_case
        print(show([row]), flush=True)
        if arguments.output is not None:
            record(arguments.output, row)


def commit_of(checkout: Path) -> str:
    """The short name of the commit, with + where files differ from it."""
    git = ["git", "-C", str(checkout)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*git, "status", "--porcelain", "llmtrain", "conf"], capture_output=True, text=True)
    return f"{commit or 'unknown'}{'+' if changed.stdout.strip() else ''}"


def count(checkout: Path, overrides: Any) -> dict[str, Any]:
    """The figures of the second training step with the package of ``checkout``."""
    if str(checkout) not in sys.path:
        sys.path.insert(0, str(checkout))
    from benchmarks.gpu.counter import counting

    with counting() as counter:
        loop = make_loop(overrides, counter)
        loop.train_step()
        loop.log.timer.phases.clear()
        loop.train_step()
    return {phase: figures(loop.log.timer.phases[phase]) for phase in PHASES if phase in loop.log.timer.phases}


def make_loop(overrides: Any, counter: Any) -> Any:
    """The run's own loop; in place of the parts that do not compute stand ones that do nothing."""
    from unittest.mock import MagicMock

    import torch

    from llmtrain import Run
    from llmtrain.base.named_generators import NamedGenerators
    from llmtrain.config.assemble import build_unit
    from llmtrain.train.loop import Loop
    from llmtrain.train.rehearsal import made_up_batch
    from llmtrain.train.step import Step

    device = torch.device("cuda")
    run = Run.compose(*overrides)
    precision = run.precision.build(device)
    vocab_size = run.vocab_size(run.build_tokenizer())
    unit = build_unit(run, vocab_size, (), device, NamedGenerators(0), load_weights=False, precision=precision)
    getattr(unit, "compile_loss", lambda: None)()  # earlier checkouts have none
    unit.train()
    timer = PhaseTimer(counter)
    loop = Loop.__new__(Loop)
    optimizer = run.optimizer.build(unit)
    for part in getattr(optimizer, "parts", ()):
        if hasattr(part, "is_to_compile"):
            part.is_to_compile = True  # as for tensors with data
    loop.step = Step(unit, optimizer, precision, run.accumulation.micro_batch_size, timer=timer)
    loop.clipping, loop.recovery = run.clipping, run.recovery.build(device)
    loop.state = MagicMock(step=run.clipping.start_step if hasattr(run.clipping, "start_step") else 0, position=0)
    loop.state.tokens = loop.state.short_sequences = 0
    loop.max_steps = 1000
    loop.length = MagicMock(missing_at=lambda step: 0, batch_size_at=lambda step, tokens: 1)
    loop.world = MagicMock(size=1)
    loop.agreement = MagicMock(flags=lambda is_save_due: None, scalars=lambda sums: {})
    loop.learning_rate = lambda step: 1e-4
    loop.saver, loop.saves, loop.readback = MagicMock(), MagicMock(), MagicMock()
    loop.log = MagicMock(timer=timer, device=device, log_every=10)
    batch = made_up_batch(run.objective, run.accumulation.batch_size_at(0, 0), run.data.sequence_length,
                          is_packed=run.data.packs)  # fmt: skip
    batch = batch.map(lambda tensor: torch.zeros(tensor.shape, dtype=tensor.dtype, device=device))
    loop.loader = MagicMock(next=lambda: batch)
    return loop


class PhaseTimer:
    """The timer of a step: it assigns the work since the last mark to a phase."""

    def __init__(self, counter: Any) -> None:
        self.counter = counter
        self.phases: dict[str, list[Any]] = {}

    def start(self) -> None:
        self.counter.take()

    def mark(self, phase: str) -> None:
        """Assign the work; of the two parts of the optimizer the first is the clipping."""
        if phase == "optimizer":
            phase = "update" if "clipping" in self.phases else "clipping"
        if phase == "clipping":
            self.counter.is_finite = None  # an optimizer that asks is answered that the gradients are finite
        self.phases.setdefault(phase, []).append(self.counter.take())

    def finish(self) -> None:
        pass


def figures(parts: list[Any]) -> dict[str, Any]:
    """Sums of a phase, and its operations with the most launches and bytes."""
    launches, read, written, waits = (
        sum((getattr(part, kind) for part in parts), Counter()) for kind in ("launches", "read", "written", "waits")
    )
    moved = read + written
    names = [name for name, _ in launches.most_common(12)]
    names += [name for name, _ in moved.most_common(12) if name not in names]
    return {
        "launches": launches.total(), "read_bytes": read.total(), "written_bytes": written.total(),
        "synchronisations": dict(waits),
        "operations": {name: [launches[name], read[name], written[name]] for name in names},
    }  # fmt: skip


def record(path: Path, row: dict[str, Any]) -> None:
    """Put the row into the file, in place of the one of the same case and commit, and write the table."""
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    rows = [other for other in rows if (other["case"], other["commit"]) != (row["case"], row["commit"])] + [row]
    cases = list(dict.fromkeys([*CASES, *(other["case"] for other in rows)]))
    rows.sort(key=lambda other: cases.index(other["case"]))  # stable: commits in the order of their counting
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"date": datetime.date.today().isoformat(), "rows": rows}, indent=1) + "\n")
    head = [
        "# Launches and bytes of a training step",
        "",
        "Counted on tensors without data by `python -m benchmarks.gpu.launches`; `benchmarks/gpu/counter.py` has the "
        "model. Context 1024; 124M with 32 sequences a step, 1558M with 16. No GPU was involved.",
        "",
    ]
    path.with_suffix(".md").write_text("\n".join([*head, show(rows)]) + "\n")


def show(rows: list[dict[str, Any]]) -> str:
    """A Markdown table: launches / GB read and written, by phase."""
    lines = ["| case | commit | " + " | ".join(PHASES) + " | all | synchronisations |", "|---" * 8 + "|"]
    for row in rows:
        phases = [row[phase] for phase in PHASES if phase in row]
        launches = sum(phase["launches"] for phase in phases)
        moved = sum(phase["read_bytes"] + phase["written_bytes"] for phase in phases)
        waits = sum((Counter(phase["synchronisations"]) for phase in phases), Counter())
        cells = [
            cell(row[p]["launches"], row[p]["read_bytes"] + row[p]["written_bytes"]) if p in row else "" for p in PHASES
        ]
        found = ", ".join(f"{number} {name}" for name, number in waits.items()) or "none"
        lines.append(f"| {row['case']} | {row['commit']} | {' | '.join(cells)} | {cell(launches, moved)} | {found} |")
    return "\n".join(lines)


def cell(launches: int, num_bytes: int) -> str:
    return f"{launches:,}; {num_bytes / 1e9:.1f} GB"


if __name__ == "__main__":
    main()
