"""A run that is stopped by SIGTERM, verified, and continued: ``python -m benchmarks.gpu.signals``."""

import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.gpu.case import ROOT, print_row

COMMON = ("data=python_docs", "loop.max_steps=100000", "loop.eval_every=0", "loop.sample_every=0",
          "metrics.log_every=1", "checkpoint.every_steps=0", "checkpoint.keep_last=2", "runtime.compile=false",
          "schedule=constant", "runtime.deterministic=true")  # fmt: skip
COMMAND = (sys.executable, "-m", "llmtrain")
SAVED = 75


def main() -> None:
    """Print a row for each of the stop, the continuation and the proof; end with 1 where one is not as it should be."""
    tiny = (
        ("model=tiny", "tokenizer=byte", "data.sequence_length=64") if "--rehearse" in sys.argv else ("model=gpt124m",)
    )
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        metrics = run / "metrics.jsonl"
        with (Path(folder) / "output.txt").open("w+") as output:
            process = subprocess.Popen([*COMMAND, "train", *tiny, *COMMON, f"run_dir='{run}'"], cwd=ROOT, stdout=output,
                                       stderr=subprocess.STDOUT)  # fmt: skip
            while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") >= 3):
                time.sleep(0.05)
            sent = time.monotonic()
            process.send_signal(signal.SIGTERM)
            status = process.wait()
            seconds = time.monotonic() - sent
            output.seek(0)
            said = output.read()
        saved = sorted(path.name for path in run.glob("checkpoints/step-*"))
        good = report("SIGTERM", status == SAVED and len(saved) == 1, said, exit=status, saved=str(saved), took=seconds)
        if not good:
            sys.exit(1)
        step = int(saved[0].removeprefix("step-"))
        good = command("resume", "resume", str(run), f"loop.max_steps={step + 3}")
        good &= command("verify by replay", "verify", str(run))
    sys.exit(0 if good else 1)


def command(case: str, *arguments: str) -> bool:
    """Run a command, which has to end with 0."""
    begun = time.monotonic()
    done = subprocess.run([*COMMAND, *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return report(case, done.returncode == 0, done.stdout, exit=done.returncode, took=time.monotonic() - begun)


def report(case: str, good: bool, output: str, **figures: object) -> bool:
    """Print the row; return ``good``."""
    said = [line for line in output.splitlines() if line.strip()][-6:]
    print_row(case, status="ok" if good else "failed", **figures, **({} if good else {"said": said}))
    return good


if __name__ == "__main__":
    main()
