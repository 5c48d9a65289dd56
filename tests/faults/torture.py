"""``make torture``: hundreds of faults at random moments, and a table of what became of them.

    python tests/faults/torture.py --kills 200 --seed 0
    python tests/faults/torture.py --kills 60 --processes 2 --distributed fsdp     # of ranks alone

The exit status is 1 if anything was lost; the folder with the evidence is kept then, and named.  The same seed makes
the same choices; moments are those of the machine.
"""

import argparse
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2]))  # for the helpers of the other tests

from rich.console import Console
from rich.live import Live
from rich.table import Table

from tests.faults import campaigns
from tests.faults.campaigns import SWEEP, Bench, Record
from tests.faults.rank_kills import Shape, make_reference, rank_kills
from tests.faults.victims import STANDARD, prepare
from tests.helpers.launcher import Launcher

HALF = ("checkpoint.every_steps=10", "checkpoint.keep_last=3", "checkpoint.before_evaluation=false")


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="of runs; the other faults come in proportion")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=60, help="no new fault is begun after so many")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="independent victims at once")
    parser.add_argument("--only", nargs="*", help="of: " + ", ".join(sorted(shares(0))))
    parser.add_argument("--processes", type=int, default=1, help="ranks of a run; of several, one or all are killed")
    parser.add_argument("--distributed", default="fsdp", help="how several ranks share a run")
    parser.add_argument("--folder", type=Path, help="to work in; default: a temporary one")
    return parser.parse_args()


def shares(kills: int) -> dict[str, Callable[[Bench], None]]:
    """The campaigns, each with its share of faults for so many kills."""
    return {
        "kills": partial(campaigns.kills, wanted=kills),
        "more-kills": partial(campaigns.kills, wanted=kills),
        "damages": partial(campaigns.damages, wanted=5 * kills, passed_over=kills // 4),
        "sweeps": partial(campaigns.sweep_kills, wanted=max(kills // 16, 2)),
        "full-disks": partial(campaigns.full_disks, wanted=max(kills // 5, 2)),
        "signals": partial(campaigns.stops, wanted=max(kills // 2, 2)),
        "power": partial(campaigns.power_cuts, wanted=max(kills // 3, 2)),
        "clock": partial(campaigns.clock_jumps, wanted=max(kills // 2, 2)),
    }


def make_references(folder: Path) -> None:
    """The undisturbed runs: to the end, to step 70 of 80, and a sweep."""
    prepare(folder)
    with Launcher(folder) as launcher:
        victims = [
            launcher.start("train", *STANDARD, "run_dir=whole"),
            launcher.start("train", *STANDARD, *HALF, "run_dir=half"),
        ]
        for victim in victims:
            victim.wait(0)
        # As a kill after the checkpoint of step 70 would have left it.
        shutil.rmtree(folder / "half" / "checkpoints" / "step-00000080")
        (folder / "half" / "summary.json").unlink()
        launcher.start(*SWEEP).wait(0)


def table_of(record: Record, seconds: float, title: str) -> Table:
    """What was tried, and what became of it."""
    table = Table(title=title, title_justify="left", caption=f"{seconds:.0f} s", caption_justify="left", box=None)
    table.add_column("fault")
    for heading in ("tried", "survived", "detected", "lost"):
        table.add_column(heading, justify="right")
    with record.lock:
        for fault, count in sorted(record.counts.items()):
            style = "bold red" if count.lost else ""
            cells = (count.tried, count.survived, count.detected, count.lost)
            table.add_row(fault, *(str(cell) if cell else "-" for cell in cells), style=style)
    return table


def work(campaign: str, run: Callable[[Bench], None], folder: Path, seed: int, record: Record, deadline: float) -> None:
    """Carry out a campaign with a launcher of its own.  What it loses is in the record; it ends with that."""
    own = folder / campaign
    chance = random.Random(f"{seed} {campaign}")
    try:
        with Launcher(prepare(own)) as launcher:
            run(Bench(launcher, own, chance, record, folder / "references", deadline))
    except Exception as error:
        with record.lock:
            where = "".join(traceback.format_exception(error)[-3:])
            record.failures.append(f"campaign {campaign} ended: {where}")
        return
    shutil.rmtree(own)


def main() -> int:
    """Run all campaigns, show how it goes, and what it came to."""
    arguments = read_arguments()
    console = Console()
    folder = (arguments.folder or Path(tempfile.mkdtemp(prefix="llmtrain-torture-"))).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["LLMTRAIN_CACHE"] = str(folder / "cache")
    began = time.monotonic()
    console.print(f"undisturbed runs first, in {folder}", highlight=False, markup=False)
    record = Record()
    if arguments.processes > 1:
        shape = Shape(arguments.processes, arguments.distributed)
        make_reference(shape, prepare(folder / "references"))
        wanted = {"rank-kills": partial(rank_kills, wanted=arguments.kills, shape=shape)}
    else:
        make_references(folder / "references")
        wanted = {name: run for name, run in shares(arguments.kills).items() if name in (arguments.only or shares(0))}
    deadline = began + 60 * arguments.minutes
    title = f"faults, seed {arguments.seed}"
    told = 0.0
    with ThreadPoolExecutor(arguments.workers) as pool:
        futures = [
            pool.submit(work, name, run, folder, arguments.seed, record, deadline) for name, run in wanted.items()
        ]
        with Live(console=console, refresh_per_second=1, transient=True) as live:
            while not all(future.done() for future in futures):
                seconds = time.monotonic() - began
                live.update(table_of(record, seconds, title))
                if not console.is_terminal and seconds > told + 60:
                    told = seconds
                    console.print(f"{seconds:.0f} s: {record.tried('')} faults, {len(record.failures)} failures")
                time.sleep(1)
    console.print(table_of(record, time.monotonic() - began, title))
    for failure in record.failures:
        console.print(failure, markup=False, highlight=False)
    if record.failures:
        console.print(f"the evidence is in {folder}", style="bold red", markup=False)
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
