"""What ``llmtrain plan`` says beside what training does: peak memory, step time and FLOPs, each in a fresh process."""

import argparse
import datetime
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

WARM_UP = 3  # steps left out of the measured time

BASE = ("loop.eval_every=0", "loop.sample_every=0", "checkpoint.every_steps=0", "metrics.log_every=1")
BASE_RUN = "{base}"  # stands for a run whose weights are adapted
# model, precision, checkpointing, tokens of a step and of a micro-batch
CONFIGURATIONS = {
    "tiny": ("model=tiny", "tokenizer=byte", "data.sequence_length=64", "precision=fp32"),
    "laptop-fp32": ("model=laptop_gpt2", "precision=fp32", "data.sequence_length=256"),
    "laptop-bf16": ("model=laptop_gpt2", "precision=bf16", "data.sequence_length=256", "accumulation.batch_size=16"),
    "30m-fp32": ("model=gpt30m", "precision=fp32", "data.sequence_length=512"),
    "30m-bf16": ("model=gpt30m", "precision=bf16", "data.sequence_length=512"),
    "30m-bf16-selective": ("model=gpt30m", "precision=bf16", "data.sequence_length=512", "accumulation.batch_size=16",
                           "accumulation.micro_batch_size=16", "activation_checkpointing=selective"),
    "30m-bf16-full": ("model=gpt30m", "precision=bf16", "data.sequence_length=512", "accumulation.batch_size=16",
                      "accumulation.micro_batch_size=16", "activation_checkpointing=full"),
    "30m-bf16-lora": ("model=gpt30m", "precision=bf16", "data.sequence_length=512", "lora=lora", "weights=checkpoint",
                      f"weights.path={BASE_RUN}"),
    "124m-fp32": ("model=gpt124m", "precision=fp32", "accumulation.batch_size=2", "accumulation.micro_batch_size=2"),
    "124m-bf16": ("model=gpt124m", "precision=bf16", "accumulation.batch_size=4", "accumulation.micro_batch_size=4"),
    "124m-bf16-full-8bit": ("model=gpt124m", "precision=bf16", "accumulation.batch_size=4", "optimizer=adamw_8bit",
                            "accumulation.micro_batch_size=4", "activation_checkpointing=full"),
    "355m-bf16-muon": ("model=gpt355m", "precision=bf16", "accumulation.batch_size=2", "optimizer=muon",
                       "accumulation.micro_batch_size=1"),
}  # fmt: skip


def main() -> None:
    """Plan and train every configuration; print a table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--configurations", nargs="+", default=[name for name in CONFIGURATIONS if name != "tiny"],
                        choices=list(CONFIGURATIONS))  # fmt: skip
    parser.add_argument("--steps", type=int, default=10, help="measured steps of training")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--overrides", nargs="*", default=[], help="added to every configuration")
    parser.add_argument("--worker", choices=["train", "flops"], help=argparse.SUPPRESS)
    parser.add_argument("--of", help=argparse.SUPPRESS)
    parser.add_argument("--base", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        overrides = overrides_of(arguments.of, arguments)
        worker = train if arguments.worker == "train" else count_flops
        print("RESULT " + json.dumps(worker(overrides, arguments.steps)))
        return
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.configurations:
            if any(BASE_RUN in override for override in CONFIGURATIONS[name]):
                arguments.base = make_base(name, Path(folder) / name)
            measured = {
                "name": name, "plan": plan(name, arguments, "true"), "estimate": plan(name, arguments, "false"),
                "train": run_worker(name, "train", arguments), "flops": run_worker(name, "flops", arguments),
            }  # fmt: skip
            results.append(measured)
            print(row(measured), flush=True)
    report(arguments, results)


def overrides_of(name: str, arguments: argparse.Namespace) -> list[str]:
    """Those of a configuration, with what is added to every one."""
    own = [override.replace(BASE_RUN, arguments.base) for override in CONFIGURATIONS[name]]
    return [*own, *BASE, *arguments.overrides]


def make_base(name: str, run_dir: Path) -> str:
    """A run of the configuration's model, without adapters, of one step."""
    own = [override for override in CONFIGURATIONS[name] if not override.startswith(("lora", "weights"))]
    run([sys.executable, "-m", "llmtrain", "train", *own, *BASE, "loop.max_steps=1", f"run_dir={run_dir}"])
    return str(run_dir)


def plan(name: str, arguments: argparse.Namespace, probe: str) -> dict[str, Any]:
    """The figures of ``llmtrain plan``."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.json"
        run([sys.executable, "-m", "llmtrain", "plan", *overrides_of(name, arguments),
             f"loop.max_steps={WARM_UP + arguments.steps}", f"probe={probe}", f"json={path}"])  # fmt: skip
        return json.loads(path.read_text())


def run(command: list[str]) -> str:
    """A command in a fresh process; its output."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done.stdout


def run_worker(name: str, worker: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One measurement in a fresh process."""
    base = [f"--base={arguments.base}"]
    output = run([sys.executable, __file__, *sys.argv[1:], "--worker", worker, "--of", name, *base])
    return json.loads(next(line for line in output.splitlines() if line.startswith("RESULT ")).removeprefix("RESULT "))


def train(overrides: list[str], steps: int) -> dict[str, Any]:
    """A real run, read from its metrics."""
    from llmtrain.base.process import prepare_program

    prepare_program()  # as the command does
    from llmtrain import Run
    from llmtrain.metrics import read_metrics

    with tempfile.TemporaryDirectory() as folder:
        result = Run.compose(*overrides, f"loop.max_steps={WARM_UP + steps}", f"output_dir={folder}").train()
        rows = [row for row in read_metrics(result.run_dir / "metrics.jsonl") if "loss" in row and "event" not in row]
    return {
        "peak_bytes": rows[-1]["memory_bytes"],
        "step_seconds": statistics.median(row["step_seconds"] for row in rows[WARM_UP:]),
    }


def count_flops(overrides: list[str], _: int) -> dict[str, Any]:
    """FLOPs a token by torch's own counter, of a forward and backward pass on tensors without data."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from llmtrain import Run
    from llmtrain.plan.blueprint import Blueprint
    from llmtrain.plan.trace import fake_tensors
    from llmtrain.train.rehearsal import made_up_batch

    composed = Run.compose(*overrides, "activation_checkpointing=none", "precision=fp32")
    cpu = torch.device("cpu")
    vocabulary = composed.vocab_size(composed.tokenizer.build())
    blueprint = Blueprint(composed, vocabulary, composed.precision.build(cpu), 1)
    length = composed.data.sequence_length
    with fake_tensors():
        step = blueprint.build()
        batch = made_up_batch(composed.objective, 1, length, is_packed=composed.data.packs).map(torch.zeros_like)
        # the counter knows the two products of attention, and not the CPU's fused kernel
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            step.accumulate(batch, 1)
    return {"flops_per_token": counter.get_total_flops() / length}


def errors(measured: dict[str, Any]) -> dict[str, float]:
    """By how much the plan is off, relative."""
    trained = measured["train"]
    return {
        "memory": measured["plan"]["peak_bytes"] / trained["peak_bytes"] - 1,
        "memory, no probe": measured["estimate"]["estimated_peak_bytes"] / trained["peak_bytes"] - 1,
        "time": measured["plan"]["step_seconds"] / trained["step_seconds"] - 1,
        "time, no probe": measured["estimate"]["step_seconds"] / trained["step_seconds"] - 1,
        "FLOPs": measured["plan"]["flops_per_token"] / measured["flops"]["flops_per_token"] - 1,
    }


def row(measured: dict[str, Any]) -> str:
    """A line of the table."""
    trained, off = measured["train"], errors(measured)
    shown = " | ".join(f"{value:+.1%}" for value in off.values())
    return f"| {measured['name']} | {trained['peak_bytes'] / 1e9:.2f} | {trained['step_seconds']:.3f} | {shown} |"


def report(arguments: argparse.Namespace, results: list[dict[str, Any]]) -> None:
    """A table on the terminal, and both files of the results."""
    import torch

    from llmtrain.base.device import device_name

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lines = [
        f"# Plan against training, {datetime.date.today().isoformat()}",
        "",
        f"{device_name(device)}, torch {torch.__version__}. Each in a process of its own; time is the median of "
        f"{arguments.steps} steps. Wanted: memory within 10%, time after the probe within 15%, FLOPs within 2% of "
        "torch's counter.",
        "",
        "| configuration | peak, GB | step, s | memory | memory, no probe | time | time, no probe | FLOPs |",
        "|---|---|---|---|---|---|---|---|",
        *map(row, results),
    ]
    text = "\n".join(lines) + "\n"
    print("\n" + text)
    arguments.output.mkdir(parents=True, exist_ok=True)
    stem = f"{datetime.date.today().isoformat()}-plan-{device.type}"
    (arguments.output / f"{stem}.md").write_text(text)
    record = {"machine": device_name(device), "torch": torch.__version__, "results": results}
    (arguments.output / f"{stem}.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
