"""A power cut: what the process had not asked the disk to keep is gone.

A kill leaves the operating system alive, and with it all that was written; a power cut does not.  ``install`` watches
``os.fsync`` and the calls that rename, and cuts at one of them: a file that was not synced since it was written keeps
only a part, and a renaming, or a new folder, is undone where the folder above was not synced afterwards.  Then the
process ends.
"""

import os
import random
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

PRELUDE = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from tests.faults.power import install
del sys.path[0]
install({{folder!r}}, at={{at}}, seed={{seed!r}})
"""


def install(folder: str, *, at: int, seed: str) -> None:
    """Cut at the ``at``-th of the calls that concern files below ``folder``; what remains of files is by ``seed``."""
    _Power(Path(folder), at, random.Random(seed))


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


class _Power:
    def __init__(self, folder: Path, at: int, chance: random.Random) -> None:
        self.folder, self.at, self.chance = folder, at, chance
        self.calls = 0
        # By inode: size and time of change when it was synced.  What was there before is on the disk by now.
        self.synced = {(found := path.stat()).st_ino: (found.st_size, found.st_mtime_ns) for path in _files(folder)}
        self.renamed: list[tuple[Path, Path]] = []  # and the folder not synced since
        self.made: list[Path] = []  # folders, and the one above not synced since
        self.lock = threading.RLock()
        self.fsync, self.rename, self.mkdir = os.fsync, os.rename, os.mkdir
        os.mkdir = self._mkdir
        os.fsync = self._fsync
        os.rename = os.replace = self._rename

    def _is_ours(self, path: Path) -> bool:
        return path.is_relative_to(self.folder)

    def _count(self) -> None:
        self.calls += 1
        if self.calls == self.at:
            self._cut()

    def _fsync(self, descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        with self.lock:
            if self._is_ours(path):
                self._count()
            self.fsync(descriptor)
            found = os.fstat(descriptor)
            self.synced[found.st_ino] = (found.st_size, found.st_mtime_ns)
            self.renamed = [pair for pair in self.renamed if pair[1].parent != path]
            self.made = [made for made in self.made if made.parent != path]

    def _mkdir(self, path: Any, *arguments: Any, **options: Any) -> None:
        self.mkdir(path, *arguments, **options)
        if self._is_ours(made := Path(path).absolute()) and made != self.folder:
            self.made.append(made)

    def _rename(self, source: Any, target: Any, **options: Any) -> None:
        one, other = (Path(path).absolute() for path in (source, target))
        with self.lock:
            if self._is_ours(other):
                self._count()
            there = other.exists() and other.is_file()
            self.rename(source, target, **options)
            if self._is_ours(other) and not there:  # an old file of the name is not kept to put it back
                self.renamed.append((one, other))

    def _cut(self) -> None:
        metrics = self.folder / "metrics.jsonl"
        if metrics.exists():  # what the user was told, which the file itself may forget
            (self.folder.parent / "told.jsonl").write_bytes(metrics.read_bytes())
        for source, target in reversed(self.renamed):
            if target.exists() and not source.exists():
                self.rename(target, source)
        for path in self.made:
            shutil.rmtree(path, ignore_errors=True)
        for path in _files(self.folder):
            found = path.stat()
            kept_bytes, changed = self.synced.get(found.st_ino, (0, 0))
            if (kept_bytes, changed) != (found.st_size, found.st_mtime_ns):
                least = min(kept_bytes, found.st_size)
                os.truncate(path, self.chance.choice((least, self.chance.randint(least, found.st_size))))
        os.kill(os.getpid(), signal.SIGKILL)
