"""A wall clock that jumps, for victims: ``clock.c`` compiled and preloaded."""

import shutil
import struct
import subprocess
from collections.abc import Mapping
from pathlib import Path

YEAR_SECONDS = 365 * 86_400


class WallClock:
    """Shifts the wall clock of processes that run with its :attr:`environment`; the monotonic clock is the true one."""

    def __init__(self, folder: Path) -> None:
        library = folder / "clock.so"
        source = Path(__file__).with_name("clock.c")
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", str(library), str(source)], check=True)
        self._shift = folder / "clock"
        self.jump_to(0)
        self.environment: Mapping[str, str] = {"LD_PRELOAD": str(library), "FAULT_CLOCK": str(self._shift)}

    @staticmethod
    def is_possible() -> bool:
        """Whether there is a C compiler."""
        return shutil.which("cc") is not None

    def jump_to(self, seconds: int) -> None:
        """From now on the clock is so many seconds ahead."""
        with self._shift.open("r+b" if self._shift.exists() else "wb") as file:
            file.write(struct.pack("q", seconds))
