"""Local SGD beside synchronous training: validation loss at the same tokens, and bytes that a rank sends.

    nice -n 10 python -m benchmarks.local_sgd                        # some 15 minutes on two cores

Every job is 2 or 4 processes of one thread on this machine, which train all its cases one after the other.
"""

import argparse
import datetime
import json
import os
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RECIPE = (
    "model=llama_tiny", "model.hidden_size=64", "model.intermediate_size=176", "tokenizer=byte", "data=python_docs",
    "data.sequence_length=64", "accumulation.batch_size=16", "accumulation.micro_batch_size=16", "optimizer.lr=3e-3",
    "schedule=warmup_cosine", "precision=fp32", "loop.eval_every=100000", "loop.eval_batches=40",
    "loop.sample_every=0", "checkpoint.every_steps=0", "runtime.compile=false", "runtime.num_threads=1",
    "runtime.device=cpu",
)  # fmt: skip
MEAN = ("distributed.outer_lr=1", "distributed.outer_momentum=0")
# name -> overrides; the first is the reference
CASES = {
    "ddp": ("distributed=ddp",),
    "DiLoCo, H = 10": ("distributed=local_sgd", "distributed.sync_every=10"),
    "DiLoCo, H = 50": ("distributed=local_sgd", "distributed.sync_every=50"),
    "plain mean, H = 10": ("distributed=local_sgd", "distributed.sync_every=10", *MEAN),
    "plain mean, H = 50": ("distributed=local_sgd", "distributed.sync_every=50", *MEAN),
    "DiLoCo, H = 50, bf16": ("distributed=local_sgd", "distributed.sync_every=50", "distributed.exchange=bf16"),
    "DiLoCo, H = 50, int8": ("distributed=local_sgd", "distributed.sync_every=50", "distributed.exchange=int8"),
}
ONE_SEED = ("DiLoCo, H = 50, bf16", "DiLoCo, H = 50, int8")  # and on the first number of ranks alone
ACKNOWLEDGED = struct.Struct("=120xQ")  # bytes that the peer has acknowledged, of ``struct tcp_info`` (linux/tcp.h)


def main() -> None:
    """Run the jobs; write the table and the figures behind it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--resume", type=Path, help="JSON of a run that was interrupted: its rows are not made again")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = [] if arguments.resume is None else json.loads(arguments.resume.read_text())["rows"]
    name = f"{datetime.date.today().isoformat()}-local-sgd"
    for seed in arguments.seeds:
        for ranks in arguments.ranks:
            firsts = seed == arguments.seeds[0], ranks == arguments.ranks[0]
            done = [row["case"] for row in rows if (row["seed"], row["ranks"]) == (seed, ranks)]
            cases = [case for case in arguments.cases if is_due(case, *firsts) and case not in done]
            if cases:
                rows += run_job(ranks, [(case, seed) for case in cases], arguments.steps)
            record = {"recipe": RECIPE, "steps": arguments.steps, "rows": rows}
            (arguments.output / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
            (arguments.output / f"{name}.md").write_text(report(record))
    print(report(record))


def is_due(case: str, first_seed: bool, first_ranks: bool) -> bool:
    """Return whether a case is trained with this seed on this number of ranks."""
    if case in ONE_SEED:
        return first_seed and first_ranks
    # synchronous training is the same on any number of ranks: once on the others, for the bytes
    return case != "ddp" or first_ranks or first_seed


# --- one job --------------------------------------------------------------------------------------------------------


def run_job(ranks: int, jobs: list[tuple[str, int]], steps: int) -> list[dict[str, Any]]:
    """Train the cases of ``jobs`` by so many processes; rank 0's row of each."""
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        server.close()
        environment = os.environ | {
            "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        request = json.dumps({"jobs": jobs, "steps": steps, "folder": folder})
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", "from benchmarks.local_sgd import train_all; train_all()", request],
                cwd=Path(__file__).parents[1], env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank in range(ranks)
        ]  # fmt: skip
        codes = [process.wait() for process in processes]
        if any(codes):
            sys.exit(f"the ranks ended with {codes}")
        return [json.loads(line) for line in (Path(folder) / "rows.jsonl").read_text().splitlines()]


def train_all() -> None:
    """Train every case as one of the ranks; rank 0 writes the rows."""
    from llmtrain.distributed.session import join
    from llmtrain.run.run import Run

    request = json.loads(sys.argv[1])
    runs = {case: Run.compose(*RECIPE, *CASES[case]) for case, _ in request["jobs"]}
    first = next(iter(runs.values()))
    with join(first.distributed, first.runtime) as world, first.runtime.session(None, ranks_here=world.size):
        for case, seed in request["jobs"]:
            row = train(case, seed, request["steps"], Path(request["folder"]), world)
            if world.is_first:
                with (Path(request["folder"]) / "rows.jsonl").open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(row, flush=True)


def train(case: str, seed: int, steps: int, folder: Path, world: Any) -> dict[str, Any]:
    """Train one case; its validation loss, and what this rank has sent."""
    import torch

    from llmtrain.config.assemble import assemble, first_state
    from llmtrain.run.directory import RunDirectory
    from llmtrain.run.run import Run
    from llmtrain.run.session import quiet_loop

    run = Run.compose(*RECIPE, *CASES[case], f"runtime.seed={seed}", f"loop.max_steps={steps}")
    run.runtime.seed_everything()
    parts = assemble(run, torch.device("cpu"), world=world)
    directory = RunDirectory(folder / f"{case} {seed} {world.rank} {world.size}")
    directory.path.mkdir()
    directory.config.write_text("")
    with quiet_loop(run, parts, directory, first_state(run, parts)) as (loop, _):
        before, start = sent_bytes(), time.perf_counter()
        while loop.state.step < steps:
            loop.advance()
        world.barrier()
        seconds, sent = time.perf_counter() - start, sent_bytes() - before
        loop.evaluator.evaluate(loop.state, 16, lambda: None)
        return {
            "case": case, "seed": seed, "ranks": world.size, "val_loss": loop.evaluator.last_val_loss,
            "tokens": loop.state.tokens, "sent_bytes": sent, "seconds": seconds,
            "parameters": sum(weight.numel() for _, weight in parts.parallel.weights()),
        }  # fmt: skip


def sent_bytes() -> int:
    """Bytes that this process has sent over its TCP connections and that have arrived (Linux)."""
    total = 0
    for link in Path("/proc/self/fd").iterdir():
        try:
            if not str(link.readlink()).startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(link.name))) as connection:
                if connection.type == socket.SOCK_STREAM and connection.family in (socket.AF_INET, socket.AF_INET6):
                    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, ACKNOWLEDGED.size)
                    total += ACKNOWLEDGED.unpack(info)[0]
        except OSError:  # closed meanwhile, or waiting for a connection
            continue
    return total


# --- the table ------------------------------------------------------------------------------------------------------


def report(record: dict[str, Any]) -> str:
    """The results as a page."""
    import torch

    from llmtrain.base.device import device_name

    rows, steps = record["rows"], record["steps"]
    reference = {row["seed"]: row["val_loss"] for row in reversed(rows) if row["case"] == "ddp"}
    table = [
        "| training | ranks | validation loss by seed | mean | beside ddp | MB a rank sends | of ddp's |",
        "|---|---|---|---|---|---|---|",
    ]
    for ranks in sorted({row["ranks"] for row in rows}):
        of_ddp = next((row["sent_bytes"] for row in rows if (row["ranks"], row["case"]) == (ranks, "ddp")), None)
        for case in CASES:
            found = [row for row in rows if (row["ranks"], row["case"]) == (ranks, case)]
            if not found:
                continue
            losses = {row["seed"]: row["val_loss"] for row in found}
            beside = [loss - reference[seed] for seed, loss in losses.items() if seed in reference]
            sent = statistics.fmean(row["sent_bytes"] for row in found)
            cells = (
                case, str(ranks), ", ".join(f"{losses[seed]:.4f}" for seed in sorted(losses)),
                f"{statistics.fmean(losses.values()):.4f}", f"{statistics.fmean(beside):+.4f}" if beside else "",
                f"{sent / 1e6:.2f}", f"{sent / of_ddp:.2%}" if of_ddp else "",
            )  # fmt: skip
            table.append(f"| {' | '.join(cells)} |")
    lines = [
        f"# Local SGD beside synchronous training, {datetime.date.today().isoformat()}",
        "",
        f"{device_name(torch.device('cpu'))}, torch {torch.__version__}, gloo, one thread a rank, the ranks on one "
        f"machine. `python -m benchmarks.local_sgd`: {rows[0]['parameters']:,} parameters, {steps:,} steps, "
        f"{rows[0]['tokens']:,} tokens in every run: `{' '.join(record['recipe'])}`. Inner optimizer AdamW.",
        "",
        *table,
        "",
        "- DiLoCo: outer rate 0.7, Nesterov momentum 0.9, the defaults and the paper's. Plain mean: outer rate 1, no "
        "momentum.",
        "- A batch is 16 sequences of 64 tokens over all ranks: a replica sees 8 or 4 of them.",
        '- "Beside ddp": mean over the seeds of the difference from the synchronous run of the same seed, which is the '
        "same on any number of ranks.",
        "- Bytes: those that the peers' kernels have acknowledged on all TCP connections of rank 0 (`TCP_INFO`), "
        "with the sums of losses and norms of every step.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
