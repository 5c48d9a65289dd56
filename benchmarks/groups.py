"""The results of a run, by what is compared with one another."""

import statistics
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One contestant of a group over the rounds."""

    contestant: str
    values: list[float]  # of the first column, a round each
    others: list[float | None]  # medians of the other columns
    ratios: list[float]  # against the reference, paired by round
    problems: list[str]  # what became of the rounds that have no result

    @property
    def median(self) -> float | None:
        return statistics.median(self.values) if self.values else None


@dataclass(frozen=True)
class Group:
    """Measurements that are compared with one another."""

    name: str
    rows: list[Row]
