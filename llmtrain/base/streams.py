"""Standard input, output and error: open, whatever started the program, and able to show any character."""

import codecs
import contextlib
import io
import os
import sys

ESCAPE = "llmtrain.escape"  # the name of an error handler of encodings


def open_standard_streams() -> None:
    """Open ``/dev/null`` in place of each standard stream that is closed, as after ``>&-``.

    Else the next file to be opened would get its number, and what is written to the stream would go into that file.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free: this one
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            stream = open(number, "w" if number else "r", encoding="utf-8", closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)


def escape_unknown_characters() -> None:
    r"""Let standard output write the characters that its encoding lacks as JSON does: é becomes ``\u00e9``."""
    codecs.register_error(ESCAPE, _escape)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors=ESCAPE)


def _escape(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    raw = error.object[error.start : error.end].encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{raw[at]:02x}{raw[at + 1]:02x}" for at in range(0, len(raw), 2)), error.end


def flush_standard_output() -> bool:
    """Write what is still in the buffer; return False if nobody can read it, and then discard all that follows.

    Without this Python would fail in the same way, with a traceback, when it exits.
    """
    try:
        sys.stdout.flush()
    except ValueError:  # closed
        return True
    except OSError:
        silence(1)
        return False
    return True


def silence(number: int) -> None:
    """Discard what is written to a descriptor from now on."""
    with contextlib.suppress(OSError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, number)
        os.close(nowhere)


def write_to_stderr(text: str) -> None:
    """Write a line without a buffer or a lock, as a signal handler may."""
    with contextlib.suppress(OSError):  # closed
        after_echo = "\n" if os.isatty(2) else ""  # of ^C
        os.write(2, f"{after_echo}{text}\n".encode())
