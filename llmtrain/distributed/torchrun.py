"""The starts of a job under torchrun: its agents start the same command again after a failure, or with other machines.

The store of the agents outlives the ranks.  It holds the number of starts and the run directory that an earlier start
has made, so that a later one resumes it.  The keys of each start have a prefix of their own: torch's have none, and a
rank that reads the address which another one had before the restart cannot connect ("connectFullMesh failed").

TORCHELASTIC_RESTART_COUNT is no number of starts: it does not count those with other machines, and an agent that comes
later begins at 0.  Importing this module does not import torch.
"""

import datetime
import json
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RUN_ID = "TORCHELASTIC_RUN_ID"
SHARES_STORE = "TORCHELASTIC_USE_AGENT_STORE"
START = "LLMTRAIN_START"  # the start of this process, once the ranks have agreed on it
POLL_SECONDS = 0.05
RUN_DIRECTORY, NUMBER, ARRIVALS = "run_directory", "starts", "arrivals"


@dataclass(frozen=True)
class Start:
    """A start of the ranks of a job."""

    number: int  # 0 for the first
    run_directory: Path | None = None  # that an earlier start has made


def is_torchrun(environment: Mapping[str, str]) -> bool:
    """Return whether torchrun has started this process."""
    return bool(environment.get(RUN_ID))


class AgentStore:
    """The store of torchrun's agents, at the address of the rendezvous."""

    def __init__(self, address: str, port: int, timeout_seconds: float) -> None:
        """Connect.  Raises RuntimeError (DistNetworkError) if nobody answers for so long."""
        from torch.distributed import PrefixStore, TCPStore

        timeout = datetime.timedelta(seconds=timeout_seconds)
        self._timeout_seconds = timeout_seconds
        self._whole = TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timeout)
        self._store: Any = PrefixStore("llmtrain/job", self._whole)

    @classmethod
    def find(cls, environment: Mapping[str, str], timeout_seconds: float) -> "AgentStore | None":
        """The store that the environment of a rank names; None: there are no agents, or they keep theirs.

        They do with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1: each start then has a store of its own.
        """
        if not is_torchrun(environment) or environment.get(SHARES_STORE) != "True":
            return None
        return cls(environment["MASTER_ADDR"], int(environment["MASTER_PORT"]), timeout_seconds)

    def of_start(self, number: int) -> Any:
        """The part of the store for the process group of a start."""
        from torch.distributed import PrefixStore

        return PrefixStore(f"llmtrain/start-{number}", self._whole)

    def record_run_directory(self, path: Path) -> None:
        """Record the directory that the next start resumes; rank 0 calls this as soon as it is made."""
        self._store.set(RUN_DIRECTORY, str(path.absolute()))

    def meet(self, rank: int, size: int, usable: Callable[[Path], Path | None] = lambda path: path) -> Start:
        """Agree on the number of this start, and on the run directory that it resumes; every rank calls this.

        Rank 0 asks ``usable`` about the recorded directory; None starts the run anew.  Raises RuntimeError
        (DistStoreError) if rank 0 does not come in time, TimeoutError on rank 0 if another does not.
        """
        if rank:
            return self._arrive()
        number = self._store.add(NUMBER, 1) - 1
        directory = None
        if number and self._store.check([RUN_DIRECTORY]):
            directory = usable(Path(self._store.get(RUN_DIRECTORY).decode()))
        self._welcome(Start(number, directory), size)
        return Start(number, directory)

    def _arrive(self) -> Start:
        """Announce this rank under a name that no earlier start has used, and wait for rank 0's answer."""
        name = secrets.token_hex(8)
        self._store.set(f"arrival-{self._store.add(ARRIVALS, 1)}", name)
        values = json.loads(self._store.get(f"answer-{name}"))
        self._store.add(f"arrived-{values['number']}", 1)
        return Start(values["number"], Path(values["directory"]) if values["directory"] else None)

    def _welcome(self, start: Start, size: int) -> None:
        """Answer the ranks that arrive, also those of earlier starts, who are gone, until all of this one are here."""
        directory = str(start.run_directory) if start.run_directory else None
        answer = json.dumps({"number": start.number, "directory": directory})
        waiting, seen = set[int](), 0
        deadline = time.monotonic() + self._timeout_seconds
        while (arrived := self._store.add(f"arrived-{start.number}", 0)) < size - 1:
            number = self._store.add(ARRIVALS, 0)
            waiting |= set(range(seen + 1, number + 1))
            seen = number
            for each in [each for each in waiting if self._store.check([f"arrival-{each}"])]:
                waiting.remove(each)
                self._store.set(f"answer-{self._store.get(f'arrival-{each}').decode()}", answer)
            if time.monotonic() > deadline:
                raise TimeoutError(f"{arrived + 1} of {size} ranks have come in {self._timeout_seconds:g} s")
            time.sleep(POLL_SECONDS)
