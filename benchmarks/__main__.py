"""The door: measures suite after suite, round after round, and writes what came of it.

After every measurement the JSON file is written, so an interruption loses one; table and plot are made at the end, or
of what there is.
"""

import argparse
import datetime
import json
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.measurement import Measurement, Record
from benchmarks.report import write_report
from benchmarks.settings import Settings, parse
from benchmarks.suites import Setup
from benchmarks.suites.registry import SUITES
from benchmarks.task import Sizes, Task

FORMAT = 1


@dataclass
class Results:
    """The JSON file of a run, and what is in it."""

    path: Path
    content: dict[str, Any]

    @property
    def records(self) -> list[Record]:
        return self.content["records"]

    def has(self, measurement: Measurement, number: int) -> bool:
        """Whether this was measured before an interruption, or is known to be absent."""
        key = (measurement.suite, measurement.group, measurement.contestant)
        return any(
            (record["suite"], record["group"], record["measurement"]) == key
            and (record["round"] == number or "absent" in record)
            for record in self.records
        )

    def write(self) -> None:
        """The file is whole at any moment."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        temporary.replace(self.path)


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the command line asks for; returns 1 if nothing could be measured, 2 for a mistake, 130 if stopped."""
    arguments = parse(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # or the process that measures would be left behind
    try:
        if arguments.report is not None:
            print(write_report(arguments.report))
            return 0
        return run(arguments)
    except (ValueError, OSError) as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def run(arguments: argparse.Namespace) -> int:
    """A run, or what is left of one."""
    results, status = None, 0
    settings = Settings.from_arguments(arguments)
    if arguments.resume is not None:
        results = Results(arguments.resume, json.loads(arguments.resume.read_text(encoding="utf-8")))
        settings = Settings(**results.content["settings"])
    with tempfile.TemporaryDirectory(prefix="llmtrain-bench-") as folder:
        setup, prepared = prepare(settings, Path(folder))
        results = results or start(setup, prepared, arguments.output)
        try:
            measure(setup, results, 60 * settings.timeout_minutes)
        except KeyboardInterrupt:
            status = 130
            print(f"\nstopped; go on with: python -m benchmarks --resume {results.path}", file=sys.stderr)
    if not any("result" in record for record in results.records):
        print(f"benchmarks: nothing was measured; {results.path} says why, if it was tried", file=sys.stderr)
        return status or 1
    print("\n" + write_report(results.path))
    return status


def prepare(settings: Settings, folder: Path) -> tuple[Setup, dict[str, Any]]:
    """The files that all read, and the machine.  Raises ValueError if ours cannot even be composed."""
    unknown = Sizes(0, 0, 0, 0, 0)
    task = Task(
        contestant="", folder=str(folder), device=settings.device, threads=settings.threads, precision="fp32",
        compiled=False, model=settings.model, tokenizer=settings.tokenizer, sizes=unknown, context=settings.context,
        batch_size=1, warm_up=1, steps=1, block=1, tokens=str(folder / "tokens.bin"),
        text=settings.text or str(folder / "text.txt"), overrides=tuple(settings.overrides),
    )  # fmt: skip
    first = Setup(settings, task, folder / "cache")
    print("preparing: token file, text, what the machine is", flush=True)
    (record,) = first.ours("prepare", "", task, worker="prepare").run(0, 600)
    if "result" not in record:
        raise ValueError(f"cannot prepare: {record.get('output') or record}")
    prepared = record["result"]
    settings = settings.complete(prepared["device"], prepared["threads"])
    task = replace(
        task, device=settings.device, threads=settings.threads, sizes=Sizes(**prepared["sizes"]),
        batch_size=settings.batch_sizes[0], warm_up=settings.warm_up, steps=settings.steps, block=settings.block,
    )  # fmt: skip
    return Setup(settings, task, folder / "cache"), prepared


def start(setup: Setup, prepared: dict[str, Any], folder: Path) -> Results:
    """The file of a new run, named by date and device."""
    stem = f"{datetime.date.today().isoformat()}-bench-{setup.settings.device}"
    names = (f"{stem}{suffix}.json" for suffix in ("", *(f"-{number}" for number in range(2, 1000))))
    path = next(folder / name for name in names if not (folder / name).exists())
    content = {
        "format": FORMAT, "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": ["python", "-m", "benchmarks", *sys.argv[1:]],
        "commit": prepared["commit"], "machine": prepared["machine"],
        "versions": prepared["versions"], "settings": setup.settings.to_json(), "sizes": prepared["sizes"],
        "flops_per_token": setup.task.sizes.flops_per_token(setup.settings.context), "records": [],
    }  # fmt: skip
    return Results(path, content)


def measure(setup: Setup, results: Results, timeout_seconds: float) -> None:
    """Every measurement of every suite once a round; the order within a group turns from round to round."""
    groups = [group for name in setup.settings.suites for group in SUITES[name].plan(setup)]
    plan = [
        (number, measurement)
        for number in range(1, setup.settings.rounds + 1)
        for group in groups
        for measurement in (group if number % 2 else reversed(group))
    ]
    begun = time.monotonic()
    for count, (number, measurement) in enumerate(plan, start=1):
        if results.has(measurement, number):
            continue
        records = measurement.run(number, timeout_seconds)
        results.records.extend(record | {"measurement": measurement.contestant} for record in records)
        results.write()
        minutes = (time.monotonic() - begun) / 60
        for record in records:
            place = f"[{count}/{len(plan)}, {minutes:.1f} min] round {number}"
            what = f"{record['suite']}: {record['group']}, {record['contestant']}"
            print(f"{place} {what}: {SUITES[record['suite']].headline(record)}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
