"""Files that a refused command must not leave behind: those of the data cache that it has made itself."""

import errno
import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path

log = logging.getLogger(__name__)

EXPENSIVE_SECONDS = 20.0  # what took longer is kept: it would have to be made again once the mistake is mended
_made: ContextVar[dict[Path, float] | None] = ContextVar("made", default=None)


def will_make(*paths: Path) -> None:
    """Record the ``paths`` that are about to be made, with the folders above them; those that exist are left out."""
    made = _made.get()
    if made is None:
        return
    for path in paths:
        for place in (path, *path.parents):
            if not place.exists():
                made.setdefault(place, time.monotonic())


@contextmanager
def removed_if_refused() -> Iterator[None]:
    """Remove what :func:`will_make` has recorded if the block ends with a mistake of the user: ValueError, a bad name.

    A process that has opened a file still reads it as it was.
    """
    token = _made.set({})
    try:
        yield
    except (ValueError, OSError) as error:
        is_mistake = isinstance(error, ValueError) or error.errno == errno.ENAMETOOLONG
        if is_mistake and (made := _made.get()):
            _remove(made)
        raise
    finally:
        _made.reset(token)


def _remove(made: dict[Path, float]) -> None:
    if any(
        place.is_dir() and place.stat().st_mtime - _wall(began) > EXPENSIVE_SECONDS for place, began in made.items()
    ):
        log.info("kept for the next time, as it took long to make: %s", min(made, key=lambda place: len(str(place))))
        return
    parents = {parent for place in made for parent in place.parents}
    for place in sorted(made, key=lambda place: len(place.parts), reverse=True):
        with suppress(OSError):  # another process uses the folder, or has removed it
            if place in parents:
                place.rmdir()
            elif place.is_dir():
                shutil.rmtree(place)
            else:
                place.unlink()


def _wall(moment: float) -> float:
    """The time of day of a moment of the monotonic clock."""
    return time.time() - time.monotonic() + moment
