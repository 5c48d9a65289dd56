"""The verbs: a module each, with ``main(config, invocation) -> exit status``."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Invocation:
    """What the command line says besides the config."""

    targets: Sequence[Path]  # run or checkpoint directories
    command: Sequence[str]  # the whole command line, for the record
    step: int | None = None  # resume: of the checkpoint that is named
