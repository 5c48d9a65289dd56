"""The first half hour on a GPU: ``python -m benchmarks.gpu [PART …]``; README.md has the steps.

Each part has a budget of seconds, each case a limit of its own; a case that fails is a row.  The parts together take
at most 25 minutes, each less than 9, so that each can be called alone where calls are limited to ten minutes.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu import checks, options, runs, speed
from benchmarks.gpu.case import ROOT, Case, Row, Setup, run_case
from benchmarks.gpu.results import Results

LEAST_SECONDS = 8  # that a case is begun with


@dataclass(frozen=True)
class Part:
    """Some cases, and the seconds that they may take together."""

    cases: Callable[[Setup], list[Case]]
    seconds: float
    jobs: int = 1  # cases at once, of those that need not be alone


PARTS = {
    "checks": Part(checks.cases, 300),
    "options": Part(options.cases, 360, jobs=6),
    "speed": Part(speed.cases, 510),
    "runs": Part(runs.cases, 330),
}  # 25 minutes


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts; returns 1 if a row is not good."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; default: all")
    parser.add_argument(
        "--out", type=Path, default=Path("/tmp/llmtrain-gpu"), help="runs, logs, caches; kept between calls"
    )
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="JSON and table")
    parser.add_argument("--only", nargs="+", default=[], metavar="TEXT", help="cases whose name has one of the texts")
    parser.add_argument("--nanogpt", metavar="DIR", help="a checkout of nanoGPT")
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter that has transformers, for speed")
    parser.add_argument(
        "--rehearse", action="store_true", help="small sizes; on a CPU what needs a GPU is only composed"
    )
    parser.add_argument("--seconds", type=float, help="budget of each part, in place of its own")
    parser.add_argument("--list", action="store_true", help="print the cases and their commands; run nothing")
    arguments = parser.parse_args(argv)
    if unknown := [name for name in arguments.parts if name not in PARTS]:
        parser.error(f"{unknown[0]}: no such part; there are {', '.join(PARTS)}")
    machine = describe_machine()
    if machine["device"] == "cpu" and not (arguments.rehearse or arguments.list):
        parser.error("there is no GPU here; --rehearse runs small sizes on a CPU")
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    setup = Setup(out, arguments.rehearse, machine, arguments.nanogpt, arguments.peer_python)
    results = Results(arguments.results, machine, rehearses=arguments.rehearse)
    good = True
    for name in arguments.parts or PARTS:
        begun = time.monotonic()
        try:
            cases = PARTS[name].cases(setup)
        except (ValueError, OSError) as error:  # what the part has to prepare
            results.begin(name)
            results.add(name, [{"case": name, "status": "failed", "said": str(error).splitlines()[-8:]}], 0.0)
            print(f"{name}: cannot be prepared: {error}", file=sys.stderr)
            good = False
            continue
        cases = [case for case in cases if not arguments.only or any(text in case.name for text in arguments.only)]
        if arguments.list:
            print("\n".join(f"{name}: {case.name}: {' '.join(case.command)}" for case in cases))
            continue
        end = begun + (arguments.seconds or PARTS[name].seconds * setup.patience)
        good &= run_part(name, cases, setup, results, begun, end)
    return 0 if good else 1


def describe_machine() -> dict[str, Any]:
    """The machine; this process never imports torch, and holds no memory of the GPU."""
    command = [sys.executable, "-m", "benchmarks.gpu.machine"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def run_part(name: str, cases: list[Case], setup: Setup, results: Results, begun: float, end: float) -> bool:
    """Run the cases until ``end``, of the monotonic clock; return whether all rows are good."""
    results.begin(name)
    seen: list[Row] = []

    def attempt(case: Case) -> list[Row]:
        left = end - time.monotonic()
        if left < LEAST_SECONDS:
            return [{"case": case.name, "status": "left out", "said": ["the part's time is spent"]}]
        return run_case(case, setup, left)

    def add(rows: list[Row]) -> None:
        spent = time.monotonic() - begun
        seen.extend(rows)
        results.add(name, rows, spent)
        for row in rows:
            said = row.get("problem") or (row.get("said") or [""])[-1]
            print(f"[{name}, {spent:.0f} of {end - begun:.0f} s] {row['case']}: {row['status']} {said}", flush=True)

    jobs = PARTS[name].jobs
    beside = [case for case in cases if not case.alone]
    for case in (case for case in cases if case.alone):
        add(attempt(case))
    with ThreadPoolExecutor(jobs) as pool:
        for done in as_completed([pool.submit(attempt, case) for case in beside]):
            add(done.result())
    good = sum(row["status"] in ("ok", "composed") for row in seen)
    print(f"{name}: {good} of {len(seen)} rows are good; {results.path}")
    return all(row["status"] in ("ok", "composed", "left out") for row in seen)


if __name__ == "__main__":
    sys.exit(main())
