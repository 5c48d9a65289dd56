"""The folder through which ranks tell their supervisor about their run, their saves and their failures.

Importing this module does not import torch.
"""

import contextlib
import json
import os
import re
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from llmtrain.base.files import write_atomically
from llmtrain.base.invocation import FAILED, USAGE_ERROR

FOLDER = "LLMTRAIN_SUPERVISED"  # the variable that names the folder
RUN_DIRECTORY = "run_dir"
HEADING = "--- rank "  # of each start in the log of a rank

# torch's words for a rank whose peer is gone or has not answered: gloo, NCCL, the store.
CONSEQUENCES = re.compile(
    r"connection (was )?(likely )?(closed|reset|refused|aborted)|broken pipe|socket (is )?closed|timed out waiting|"
    r"wait timeout|recvvalue|sendbytes|recvbytes|failed to recv|ncclremoteerror|ncclsystemerror|"
    r"nccl communicator was aborted|watchdog caught collective|connectfullmesh|peer is gone|Dist(Network|Store)Error",
    re.IGNORECASE,
)


class Kind(Enum):
    """The kinds of failures of a rank, by what they say about the cause."""

    error = "error"
    usage = "usage"  # a mistake of the user's, exit status 2
    consequence = "consequence"  # of the failure of another rank
    verdict = "verdict"  # of the heartbeat: about another rank, or about all


@dataclass(frozen=True)
class Failure:
    """The last words of a rank."""

    rank: int
    host: str
    kind: Kind
    message: str
    time: float  # of day, in seconds
    is_shown: bool = False  # on the terminal of rank 0
    about: tuple[int, ...] = ()  # of a verdict: the ranks that hold the others up
    smaller_micro_batch: int = 0  # after memory ran out: sequences with which a restart may fit

    @classmethod
    def read(cls, path: Path) -> "Failure | None":
        """Read a record that a rank left; None if there is none."""
        try:
            return cls.parse(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    @classmethod
    def parse(cls, text: str) -> "Failure":
        """The record in a text as :meth:`text` makes it.  Raises ValueError for another."""
        try:
            values: dict[str, Any] = json.loads(text)
            about = tuple(int(rank) for rank in values.get("about", ()))
            return cls(**values | {"kind": Kind(values["kind"]), "about": about})
        except (KeyError, TypeError) as error:
            raise ValueError(f"no record of a failure: {text}") from error

    def text(self) -> str:
        """The record as JSON."""
        return json.dumps(asdict(self) | {"kind": self.kind.value})


def kind_of(error: BaseException | str, status: int = FAILED) -> Kind:
    """Tell an error that only says that another rank is gone from one of this rank's own."""
    if status == USAGE_ERROR:
        return Kind.usage
    names = {kind.__name__ for kind in type(error).__mro__}
    if names & {"DistNetworkError", "DistStoreError", "ConnectionError"} or CONSEQUENCES.search(str(error)):
        return Kind.consequence
    return Kind.error


class Supervision:
    """The rank's side: what it tells its supervisor; nothing where there is none."""

    def __init__(self, folder: Path | None, rank: int, host: str = "") -> None:
        self.folder = folder
        self.rank = rank
        self.host = host or socket.gethostname()
        self._failed = False

    @classmethod
    def of(cls, environment: Mapping[str, str], rank: int) -> "Supervision":
        """The supervision that a supervisor has put into the environment of this process."""
        folder = environment.get(FOLDER)
        return cls(Path(folder) if folder else None, rank)

    def report_run_directory(self, path: Path) -> None:
        """Tell where the run is, so that it can be resumed; rank 0 calls this as soon as the directory is made."""
        self._write(RUN_DIRECTORY, str(path.absolute()))

    def report_failure(self, error: BaseException | str, *, status: int = FAILED, kind: Kind | None = None,
                       is_shown: bool = False, about: Sequence[int] = ()) -> None:  # fmt: skip
        """Tell why this rank is about to end; the first message counts.

        ``is_shown``: rank 0 has printed it already, so that the supervisor need not.  ``about``: the ranks that a
        verdict names.
        """
        if self._failed:
            return
        self._failed = True
        message = str(error) or type(error).__name__
        kind = kind or kind_of(error, status)
        failure = Failure(self.rank, self.host, kind, message, time.time(), is_shown and self.rank == 0,
                          tuple(about), getattr(error, "smaller_micro_batch", 0))  # fmt: skip
        self._write(failure_name(self.rank), failure.text())

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Surround the writing of files of a checkpoint: the supervisor waits for its end before it kills."""
        marker = None if self.folder is None else self.folder / saving_name(self.rank)
        with contextlib.suppress(OSError):
            if marker is not None:
                marker.touch()
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                if marker is not None:
                    marker.unlink(missing_ok=True)

    def _write(self, name: str, text: str) -> None:
        if self.folder is not None:
            with contextlib.suppress(OSError):  # the supervisor is gone
                write_atomically(self.folder / name, text)


def failure_name(rank: int) -> str:
    return f"failure-{rank:05d}"


def saving_name(rank: int) -> str:
    return f"saving-{rank:05d}"


def log_name(rank: int) -> str:
    """The name of a rank's log, in a run's folder ``ranks`` and, until there is one, in the supervisor's folder."""
    return f"rank-{rank:05d}.log"


def read_run_directory(folder: Path) -> Path | None:
    """The run directory that rank 0 has told; None: none yet."""
    try:
        text = (folder / RUN_DIRECTORY).read_text(encoding="utf-8")
    except OSError:
        return None
    return Path(text) if text else None


def is_supervised(environment: Mapping[str, str] | None = None) -> bool:
    """Return whether a supervisor of this program has started this process."""
    return bool((os.environ if environment is None else environment).get(FOLDER))
