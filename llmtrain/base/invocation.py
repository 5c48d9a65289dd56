"""The invocation of a command, besides its config, and the exit statuses that it returns."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

FINISHED = 0
FAILED = 1
USAGE_ERROR = 2
INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: stopped by a signal after saving; resume continues


@dataclass(frozen=True)
class Invocation:
    """The command line besides the config."""

    targets: Sequence[Path]  # run or checkpoint directories
    command: Sequence[str]  # the complete command line, for the records
    stored: object | None = None  # resume: the stored run at the target
