"""Numbers and text for people: the one place where the program decides how a quantity looks."""

import math
import re
from typing import Any

_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    r"""``text`` with what a terminal would obey written out: an escape character becomes the four letters ``\x1b``.

    Covers the C0 and C1 controls (newline and tab stay), marks that reverse the direction of writing, and lone
    surrogates, which no encoding accepts.
    """
    return _UNSAFE.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


def significant(value: float, digits: int = 3) -> str:
    """``value`` to three significant digits: 0.0411, 1.83, 12.0, 1.23e+04."""
    return f"{value:#.{digits}g}".rstrip(".")


def count(value: float) -> str:
    """How many: 999, 12.3k, 124M, 1.56B."""
    return _scaled(value, ("", "k", "M", "B", "T"))


def size(num_bytes: float) -> str:
    """Memory or disk in decimal units, as vendors and ``ls --si`` count: 512 B, 1.49 GB."""
    return _scaled(num_bytes, (" B", " kB", " MB", " GB", " TB", " PB"))


def rate(per_second: float, unit: str) -> str:
    """A speed with SI prefixes: ``rate(4.2e11, "FLOP/s")`` is 420 GFLOP/s."""
    return _scaled(per_second, (" ", " k", " M", " G", " T", " P")) + unit


def _scaled(value: float, units: tuple[str, ...]) -> str:
    if not math.isfinite(value):
        return str(value)
    for unit in units[:-1]:
        if abs(value) < 999.5:  # what rounds to 1000 belongs to the next unit
            whole = isinstance(value, int) or value == 0
            return (str(round(value)) if whole else significant(value)) + unit
        value /= 1000.0
    return significant(value) + units[-1]


ASKED = {"generate": ' prompt="…"', "predict": ' text="…"', "export": " to=DIR"}  # what a verb takes besides a run


def command(verb: str, target: str) -> str:
    """A command line to show: ``llmtrain predict RUN_DIR text="…"``."""
    return f"llmtrain {verb} {target}{ASKED.get(verb, '')}"


def duration(seconds: float) -> str:
    """A time span by its two largest units: 83 ms, 12.4 s, 3m 07s, 1h 02m, 2d 03h; whole seconds stay so: 12 s."""
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
    """Nats per token, four decimals: 3.4521; 2.1e-05 where those would show next to nothing; nan and inf as such."""
    if 0 < abs(value) < 0.001:
        return f"{value:.1e}"
    return f"{value:.4f}" if not abs(value) >= 10_000 else f"{value:.3e}"


def learning_rate(value: float) -> str:
    """3.0e-04."""
    return f"{value:.1e}"


def percent(fraction: float) -> str:
    """A share of one: 0.341 is 34.1%."""
    return f"{100 * fraction:.1f}%"


def quantity(key: str, value: Any) -> str:
    """``value`` in the unit that its ``key`` names, as in ``save_seconds`` or ``memory_bytes``; else as it is."""
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
    """A config value as one would type it."""
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    return visible(str(value))
