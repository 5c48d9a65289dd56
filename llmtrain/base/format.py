"""Numbers and text for people: the one place that formats quantities."""

import math
import os
import re
from contextlib import suppress
from typing import Any

WIDEST = 130  # characters of a line where the width of the terminal is unknown
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    r"""Write out the characters that a terminal would obey: an escape character becomes the four letters ``\x1b``.

    Covers the C0 and C1 controls (newline and tab stay), marks that reverse the direction of writing, and lone
    surrogates, which no encoding accepts.
    """
    return _UNSAFE.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


def significant(value: float, digits: int = 3) -> str:
    """Format to three significant digits: 0.0411, 1.83, 12.0, 1.23e+04."""
    return f"{value:#.{digits}g}".rstrip(".")


def count(value: float) -> str:
    """Format a number of things: 999, 12.3k, 124M, 1.56B."""
    return _scaled(value, ("", "k", "M", "B", "T"))


def counted(number: int, noun: str) -> str:
    """Format a whole number of things with their name: 1 step, 1,000 steps."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def size(num_bytes: float) -> str:
    """Format bytes in decimal units, as vendors and ``ls --si`` do: 512 B, 1.49 GB."""
    return _scaled(num_bytes, (" B", " kB", " MB", " GB", " TB", " PB"))


def memory_size(num_bytes: float) -> str:
    """Format the memory of a device in decimal and in binary units: an 80 GB card has 84.9 GB (79.1 GiB)."""
    return f"{size(num_bytes)} ({significant(num_bytes / 2**30)} GiB)"


def rate(per_second: float, unit: str) -> str:
    """Format a speed with SI prefixes: ``rate(4.2e11, "FLOP/s")`` is 420 GFLOP/s."""
    return _scaled(per_second, (" ", " k", " M", " G", " T", " P")) + unit


def _scaled(value: float, units: tuple[str, ...]) -> str:
    if not math.isfinite(value):
        return str(value)
    for unit in units[:-1]:
        if abs(value) < 999.5:  # 999.5 rounds to 1000, which belongs to the next unit
            whole = isinstance(value, int) or value == 0
            return (str(round(value)) if whole else significant(value)) + unit
        value /= 1000.0
    return significant(value) + units[-1]


REQUIRED = {"generate": ' prompt="…"', "predict": ' text="…"', "export": " to=DIR"}  # keys of a verb, after its target


def command(verb: str, target: str) -> str:
    """Format a command line to show: ``llmtrain predict RUN_DIR text="…"``."""
    return f"llmtrain {verb} {target}{REQUIRED.get(verb, '')}"


def duration(seconds: float) -> str:
    """Format a time by its two largest units: 83 ms, 12.4 s, 3m 07s, 1h 02m, 2d 03h; ints stay whole: 12 s."""
    if not math.isfinite(seconds):
        return str(seconds)
    if isinstance(seconds, int) and seconds < 60:
        return f"{seconds} s"
    if seconds < 0.9995:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, whole_seconds = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}m {whole_seconds:02d}s"
    hours, minutes = divmod(round(seconds / 60), 60)
    if hours < 24:
        return f"{hours}h {minutes:02d}m"
    days, hours = divmod(round(seconds / 3600), 24)
    return f"{days}d {hours:02d}h"


def loss(value: float) -> str:
    """Format nats per token with four decimals, 3.4521, and in powers of ten below 0.001; nan and inf stay."""
    if 0 < abs(value) < 0.001:
        return f"{value:.1e}"
    return f"{value:.4f}" if not abs(value) >= 10_000 else f"{value:.3e}"


def learning_rate(value: float) -> str:
    """Format as 3.0e-04."""
    return f"{value:.1e}"


def percent(fraction: float) -> str:
    """Format a share of one: 0.341 is 34.1%."""
    return f"{100 * fraction:.1f}%"


def quantity(key: str, value: Any) -> str:
    """Format ``value`` in the unit that its ``key`` names, as in ``save_seconds``; without a unit as it is."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return visible(str(value))
    if key.endswith("bytes"):
        return size(value)
    if key.endswith("seconds"):
        return duration(value)
    if key.endswith("loss"):
        return loss(value)
    if key in ("lr", "learning_rate"):
        return learning_rate(value)
    return f"{value:,}" if isinstance(value, int) else significant(value, 4)


def setting(value: Any) -> str:
    """Format a config value as it is typed."""
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    return visible(str(value))


def width() -> int:
    """Return ``COLUMNS``, else the width of the terminal behind a pipe such as ``| less``, else :data:`WIDEST`."""
    if os.environ.get("COLUMNS", "").isdigit():
        return int(os.environ["COLUMNS"])
    for stream in (2, 0):
        with suppress(OSError):
            return os.get_terminal_size(stream).columns
    return WIDEST
