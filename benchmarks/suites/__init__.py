"""What is measured: each module here is a suite, a list of groups of measurements and how to read their results.

The measurements of a group take turns and are compared with one another, round by round.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.measurement import Measurement, Record
from benchmarks.settings import Settings
from benchmarks.task import Task

OURS = "llmtrain"


@dataclass(frozen=True)
class Setup:
    """What a suite makes its measurements of."""

    settings: Settings
    task: Task  # of the first batch size; precision, contestant and so on are the suite's to choose
    cache: Path  # of compiled code and tokenised text: what one process leaves there, later ones find

    def task_for(self, mode: str, **changes: Any) -> Task:
        """The task in ``mode``, such as ``bf16-compiled``."""
        precision, _, compiled = mode.partition("-")
        return replace(self.task, precision=precision, compiled=bool(compiled), **changes)

    def ours(self, suite: str, group: str, task: Task, contestant: str = OURS, worker: str = "ours") -> Measurement:
        """A measurement of ours."""
        return Measurement(suite, group, contestant, worker, task, environment=self.environment())

    def peers(self, suite: str, group: str, task: Task) -> list[Measurement]:
        """One of each peer's."""
        settings = self.settings
        return [
            Measurement(
                suite, group, peer, peer, replace(task, checkout=settings.nanogpt), settings.python_of(peer),
                self.environment(),
            )
            for peer in settings.peers
        ]  # fmt: skip

    def environment(self) -> dict[str, str]:
        """Where caches are: not the user's, which would be warm for some.  And no peer asks the network."""
        return {
            "LLMTRAIN_CACHE": str(self.cache / "data"), "TORCHINDUCTOR_CACHE_DIR": str(self.cache / "inductor"),
            "HF_HOME": str(self.cache / "hf"), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true",
            "OMP_NUM_THREADS": str(self.task.threads), "RAYON_NUM_THREADS": str(self.task.threads),
        }  # fmt: skip


@dataclass(frozen=True)
class Facts:
    """What figures are related to."""

    flops_per_token: float
    flops_per_second: dict[str, float]  # by precision, the machine's own
    data_sheet: float | None  # FLOP/s in bf16 that the maker of a GPU gives
    needed: float | None  # tokens/s that the fastest training here takes


@dataclass(frozen=True)
class Column:
    """A figure of the results table: its median over the rounds."""

    title: str
    value: Callable[[Record, Facts], float | None]
    text: Callable[[float], str]


@dataclass(frozen=True)
class Suite:
    """The first column is what is compared: with its range, and paired with ``reference``."""

    name: str
    title: str
    about: str
    plan: Callable[[Setup], list[list[Measurement]]]
    columns: tuple[Column, ...]
    reference: str | None = None  # the contestant that the others are compared with
    comparison: str = ""  # title of that column: above 1 the reference is the better one
    more_is_better: bool = True
    details: Callable[[Sequence[Record]], list[str]] = field(default=lambda records: [])

    def headline(self, record: Record) -> str:
        """What came of one measurement, in a few words."""
        if "absent" in record:
            return f"not here: {record['absent']}"
        if "error" in record:
            return f"failed: {record['error']}"
        facts = Facts(0.0, {}, None, None)
        said = (f"{column.text(value)} {column.title}" for column in self.columns
                if (value := column.value(record, facts)) is not None)  # fmt: skip
        return next(said, "")


def figure(key: str) -> Callable[[Record, Facts], float | None]:
    """The value of a key of the result."""
    return lambda record, facts: record["result"].get(key)


def gigabytes(num_bytes: float) -> str:
    """As in 4.93."""
    return f"{num_bytes / 1e9:.2f}"
