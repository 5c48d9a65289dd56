"""Harm done to the files of a checkpoint, and undone again."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.faults.victims import FILES, files_of


@dataclass(frozen=True)
class Damage:
    """What is done to one file of a checkpoint."""

    kind: str  # flip, truncate, missing, empty folder, extra
    name: str
    place: int = 0  # byte that is flipped, or length that is left
    bit: int = 0

    def __str__(self) -> str:
        details = {"flip": f" byte {self.place} bit {self.bit}", "truncate": f" to {self.place} bytes"}
        return f"{self.kind} {self.name}{details.get(self.kind, '')}"

    def do(self, checkpoint: Path) -> None:
        """Do it."""
        file = checkpoint / self.name
        if self.kind == "flip":
            content = bytearray(file.read_bytes())
            content[self.place] ^= 1 << self.bit
            file.write_bytes(content)
        elif self.kind == "truncate":
            with file.open("r+b") as stream:
                stream.truncate(self.place)
        elif self.kind == "missing":
            file.unlink()
        elif self.kind == "folder":
            file.unlink()
            file.mkdir()
        else:
            file.write_bytes(b"extra")

    @contextmanager
    def done(self, checkpoint: Path) -> Iterator[None]:
        """For a while."""
        file = checkpoint / self.name
        before = file.read_bytes() if file.exists() else None
        self.do(checkpoint)
        try:
            yield
        finally:
            if file.is_dir():
                file.rmdir()
            else:
                file.unlink(missing_ok=True)
            if before is not None:
                file.write_bytes(before)


def flips(checkpoint: Path, count: int, chance: random.Random) -> Iterator[Damage]:
    """``count`` flipped bits in each file: in the first byte, the last, and at random."""
    for name in files_of(checkpoint):
        size = (checkpoint / name).stat().st_size
        places = [0, size - 1, *(chance.randrange(size) for _ in range(count))][:count]
        yield from (Damage("flip", name, place, chance.randrange(8)) for place in places)


def truncations(checkpoint: Path) -> Iterator[Damage]:
    """Each file cut to every tenth of its length, and by its last byte."""
    for name in files_of(checkpoint):
        size = (checkpoint / name).stat().st_size
        yield from (
            Damage("truncate", name, place) for place in [*(size * tenth // 10 for tenth in range(10)), size - 1]
        )


def absences(files: Sequence[str] = FILES) -> Iterator[Damage]:
    """Each file missing, or a folder in its place; a file that does not belong there."""
    for name in files:
        yield Damage("missing", name)
        yield Damage("folder", name)
    for name in ("extra.bin", "model.safetensors.part", ".hidden"):
        yield Damage("extra", name)


def names_the_place(message: str, damage: Damage, checkpoint: Path) -> bool:
    """Whether an error says which file it is; that a folder without a manifest is no checkpoint will do."""
    if damage.name == "manifest.json" and damage.kind in ("missing", "folder"):
        return str(checkpoint) in message and "manifest.json" in message
    return str(checkpoint / damage.name) in message
