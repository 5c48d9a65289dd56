"""``llmtrain report DIR…``: a ranked table of runs and sweeps, and their curves."""

import sys
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.text import Text

from llmtrain.base.format import visible
from llmtrain.base.invocation import Invocation
from llmtrain.base.outputs import check_output
from llmtrain.report.curves import draw_comparison, draw_run
from llmtrain.report.runs import find_runs, summarise
from llmtrain.report.table import comparisons, confusion_table

MAX_MATRICES = 4  # runs; with more no confusion matrix is printed
UNWRAPPED = 1000  # columns; a table in a pipe or file is as wide as it needs


@dataclass(frozen=True)
class Report:
    """The settings of ``conf/report.yaml``."""

    output: str | None
    plot: bool

    def __post_init__(self) -> None:
        if self.output is not None and not self.plot:
            raise ValueError(f"output={self.output}: with plot=false nothing is drawn; leave one of them out")

    def comparison_path(self, targets: list[Path], runs: list[Path]) -> Path:
        """The path of the picture of several runs: ``output``, else in the sweep, else next to the first run.

        Raises ValueError for an ``output`` that cannot be written, however many runs there are.
        """
        if self.output is not None:
            path = Path(self.output)
            if path.suffix.lower() != ".png":
                raise ValueError(f"output={self.output}: the picture is a PNG file; name it {path.name}.png")
            check_output("output", self.output)
            return path
        return (targets[0] if len(targets) == 1 else runs[0].parent) / "report.png"


def main(report: Report, invocation: Invocation) -> int:
    """Print the table, draw each run's ``loss.png`` and, for more than one, the comparison; of one run, ``output``."""
    targets = list(invocation.targets)
    runs = find_runs(targets)
    path = report.comparison_path(targets, runs)
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else UNWRAPPED)
    summaries = [summarise(run) for run in runs]
    begun = [summary.path for summary in summaries if summary.state != "pending"]
    if report.output is not None and not begun:
        raise ValueError(f"output={report.output}: no run has begun, and there is nothing to draw; leave it out")
    console.print(comparisons(summaries))
    for summary in summaries if len(summaries) <= MAX_MATRICES else ():
        if summary.confusion:
            console.print(f"\n{visible(summary.path.name)}, at its best validation", style="bold")
            console.print(confusion_table(summary.labels, summary.confusion))
    if report.plot and begun:
        written = [draw_run(run) for run in begun]
        if len(begun) == 1 and report.output is not None:
            written.append(draw_run(begun[0], report.output))
        elif len(begun) > 1:  # of several runs only the comparison is named; each has its loss.png
            written = [draw_comparison(begun, path, key=None if report.output is None else "output")]
        console.print(Text("\ncurves: " + ", ".join(visible(str(picture)) for picture in written)), soft_wrap=True)
    return 0
