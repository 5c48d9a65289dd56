"""The starts of a job under torchrun: its agents start the same command again after a failure, or with other machines.

A later start resumes the run directory that an earlier one has made.  The store of the agents, which outlives the
ranks, holds it.  With TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, which torch 2.13 needs where a machine joins a running job,
each start has a store of its own; then a file holds it, with the agents that took part: an agent is of one job only.

In the store of the agents the keys of each start have a prefix of their own.  Torch's have none, and a rank that reads
the address which another one had before the restart cannot connect ("connectFullMesh failed").
TORCHELASTIC_RESTART_COUNT is no number of starts: it does not count those with other machines, and an agent that comes
later begins at 0.  Importing this module does not import torch.
"""

import contextlib
import datetime
import json
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmtrain.base.files import write_atomically

RUN_ID = "TORCHELASTIC_RUN_ID"
SHARES_STORE = "TORCHELASTIC_USE_AGENT_STORE"
START = "LLMTRAIN_START"  # the start of this process, once the ranks have agreed on it
POLL_SECONDS = 0.05
RUN_DIRECTORY, NUMBER, ARRIVALS = "run_directory", "starts", "arrivals"


@dataclass(frozen=True)
class Start:
    """A start of the ranks of a job."""

    number: int = 0  # of those with the same store
    run_directory: str | None = None  # that an earlier start has made
    record: str = ""  # the file that holds the directory for the next start, where no store does
    agents: tuple[str, ...] = ()  # of the ranks

    @classmethod
    def parse(cls, text: str) -> "Start":
        """The start in a text as :meth:`text` makes it."""
        values = json.loads(text)
        return cls(**values | {"agents": tuple(values["agents"])})

    def text(self) -> str:
        """The start as JSON."""
        return json.dumps(asdict(self))


def is_torchrun(environment: Mapping[str, str]) -> bool:
    """Return whether torchrun has started this process."""
    return bool(environment.get(RUN_ID))


def own_agent() -> str:
    """A name for the agent that has started this process, which no other process has ever had."""
    parent = os.getppid()
    try:
        began = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[19]
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except (OSError, IndexError):  # not Linux
        began = boot = ""
    return f"{socket.gethostname()}:{boot}:{parent}:{began}"


class JobStore:
    """The store of a start: that of torchrun's agents, or one that rank 0 has at the address of the rendezvous."""

    def __init__(self, environment: Mapping[str, str], rank: int, timeout_seconds: float) -> None:
        """Connect.  Raises RuntimeError (DistNetworkError) if nobody answers for so long."""
        from torch.distributed import PrefixStore, TCPStore

        self.is_shared = environment.get(SHARES_STORE) == "True"
        self.timeout_seconds = timeout_seconds
        self._whole = TCPStore(
            environment["MASTER_ADDR"], int(environment["MASTER_PORT"]), is_master=rank == 0 and not self.is_shared,
            wait_for_workers=False, timeout=datetime.timedelta(seconds=timeout_seconds),
        )  # fmt: skip
        self._store: Any = PrefixStore("llmtrain/job", self._whole)

    def of_start(self, start: Start) -> Any:
        """The part of the store for the process group of a start."""
        from torch.distributed import PrefixStore

        return PrefixStore(f"llmtrain/start-{start.number}", self._whole)

    def record_run_directory(self, path: Path, start: Start) -> None:
        """Record the directory that the next start resumes; rank 0 calls this as soon as it is made."""
        if self.is_shared:
            self._store.set(RUN_DIRECTORY, str(path.absolute()))
        elif start.record:
            record = {RUN_DIRECTORY: str(path.absolute()), "agents": start.agents}
            with contextlib.suppress(OSError):  # a restart then begins anew
                write_atomically(Path(start.record), json.dumps(record))

    def meet(self, rank: int, size: int, record: Path, usable: Callable[[Path], Path | None]) -> Start:
        """Agree on the number of this start, and on the run directory that it resumes; every rank calls this.

        Rank 0 asks ``usable`` about the recorded directory; None starts the run anew.  Raises RuntimeError
        (DistStoreError) if rank 0 does not come in time, TimeoutError on rank 0 if another does not.
        """
        if rank:
            return self._arrive()
        if self.is_shared:
            number = self._store.add(NUMBER, 1) - 1
            known = self._store.get(RUN_DIRECTORY).decode() if self._store.check([RUN_DIRECTORY]) else None
            agents = {own_agent()}
        else:
            agents = {own_agent(), *self._wait_for_agents(size - 1)}
            number, known = 0, read_record(record, agents)
        directory = usable(Path(known)) if known else None
        found = Start(number, str(directory) if directory else None, str(record), tuple(sorted(agents)))
        self._welcome(found, size)
        return found

    def _arrive(self) -> Start:
        """Announce this rank under a name that no earlier start has used, and wait for rank 0's answer."""
        name = secrets.token_hex(8)
        self._store.set(f"arrival-{self._store.add(ARRIVALS, 1)}", f"{name} {own_agent()}")
        start = Start.parse(self._store.get(f"answer-{name}").decode())
        self._store.add(f"arrived-{start.number}", 1)
        return start

    def _wait_for_agents(self, number: int) -> Iterable[str]:
        """Wait for so many ranks; return the names of their agents."""
        self._store.wait([f"arrival-{each}" for each in range(1, number + 1)]) if number else None
        return [self._store.get(f"arrival-{each}").decode().split()[1] for each in range(1, number + 1)]

    def _welcome(self, start: Start, size: int) -> None:
        """Answer the ranks that arrive, also those of earlier starts, who are gone, until all of this one are here."""
        waiting, seen = set[int](), 0
        deadline = time.monotonic() + self.timeout_seconds
        while (arrived := self._store.add(f"arrived-{start.number}", 0)) < size - 1:
            number = self._store.add(ARRIVALS, 0)
            waiting |= set(range(seen + 1, number + 1))
            seen = number
            for each in [each for each in waiting if self._store.check([f"arrival-{each}"])]:
                waiting.remove(each)
                self._store.set(f"answer-{self._store.get(f'arrival-{each}').decode().split()[0]}", start.text())
            if time.monotonic() > deadline:
                raise TimeoutError(f"{arrived + 1} of {size} ranks have come in {self.timeout_seconds:g} s")
            time.sleep(POLL_SECONDS)


def record_path(run_dir: str | None, output_dir: str, environment: Mapping[str, str]) -> Path:
    """The file that holds the run directory of a job, beside the run directories."""
    folder = Path(output_dir) if run_dir is None else Path(run_dir).absolute().parent
    name = "".join(letter if letter.isalnum() else "_" for letter in environment.get(RUN_ID, ""))
    return folder.absolute() / f".torchrun-{name[:100]}.json"


def read_record(path: Path, agents: Iterable[str]) -> str | None:
    """The run directory that a start with one of ``agents`` has made; None: none has."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return str(record[RUN_DIRECTORY]) if set(record["agents"]) & set(agents) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
