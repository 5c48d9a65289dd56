"""The hosts of a run, from a file as DeepSpeed and MPI read it.  Importing this module does not import torch."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

NAME = re.compile(r"(?:[A-Za-z0-9_][A-Za-z0-9_.-]*@)?[A-Za-z0-9_\[][A-Za-z0-9_.:%\]-]*")  # no option of ssh's
LARGEST = 4096  # slots of one host


@dataclass(frozen=True)
class Host:
    """A machine and the number of ranks that run on it."""

    name: str  # as ssh takes it
    slots: int

    @property
    def address(self) -> str:
        """The name without the user."""
        return self.name.rpartition("@")[2]


def read_hostfile(path: Path) -> list[Host]:
    """Read ``host slots=8`` lines, and MPICH's ``host:8``; ``#`` begins a comment.

    Raises ValueError that names the line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise ValueError(
            f"distributed.hostfile={path}: {reason}; it has a line for each host: host-a slots=8"
        ) from None
    lines: dict[str, int] = {}
    hosts: list[Host] = []
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        place = f"distributed.hostfile={path}, line {number}"
        host = _host(words, place)
        if host.name in lines:
            raise ValueError(f"{place}: {host.name} is in line {lines[host.name]} already; give its ranks in one line: "
                             f"{host.name} slots=N")  # fmt: skip
        lines[host.name] = number
        hosts.append(host)
    if not hosts:
        raise ValueError(f"distributed.hostfile={path}: names no host; it has a line for each: host-a slots=8")
    if len(hosts) > 1 and (local := next((each for each in hosts if is_loopback(each.address)), None)) is not None:
        raise ValueError(f"distributed.hostfile={path}, line {lines[local.name]}: {local.name}: the other hosts cannot "
                         "reach this one by that name; use the name that they know")  # fmt: skip
    return hosts


def is_loopback(address: str) -> bool:
    """Return whether a name means the machine itself, whichever that is."""
    return address in ("localhost", "::1") or address.startswith("127.")


def _host(words: Sequence[str], place: str) -> Host:
    name, slots = words[0], None
    if (found := re.fullmatch(r"([^:]+):(\d+)", name)) is not None:
        name, slots = found[1], found[2]
    if NAME.fullmatch(name) is None:
        raise ValueError(f"{place}: {name}: no name of a host")
    largest = None
    for word in words[1:]:
        key, _, value = word.partition("=")
        if key == "slots" and slots is None:
            slots = value
        elif key in ("max_slots", "max-slots"):
            largest = value
        else:
            raise ValueError(f"{place}: {word}: not understood; the form is: {name} slots=8")
    if slots is None:
        raise ValueError(f"{place}: {name}: the number of ranks is missing: {name} slots=8")
    if not slots.isdecimal() or not 0 < int(slots) <= LARGEST:
        raise ValueError(f"{place}: slots={slots}: must be a whole number, 1 to {LARGEST}")
    if largest is not None and (not largest.isdecimal() or int(largest) < int(slots)):
        raise ValueError(f"{place}: max_slots={largest}: must be a whole number, at least that of slots")
    return Host(name, int(slots))
