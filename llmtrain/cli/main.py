"""The command line: verb -> conf/<verb>.yaml -> Hydra -> commands/<verb>.py.

Imports wait until they are needed: ``--help`` imports no Hydra, ``--cfg job`` no torch.
"""

import re
import sys
from collections.abc import Sequence

from llmtrain import __version__
from llmtrain.base.format import visible
from llmtrain.base.invocation import FAILED, FINISHED
from llmtrain.base.streams import escape_unknown_characters, flush_standard_output, silence
from llmtrain.cli.arguments import VERBS, parse
from llmtrain.cli.overview import overview
from llmtrain.config.secret_values import hide

STOPPED = 130  # as a shell reports SIGINT


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit status: 0, 1 failed, 2 usage, 75 stopped by a signal after saving."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    escape_unknown_characters()
    try:
        if arguments[:1] in (["-sc"], ["--shell_completion"], ["--shell-completion"]):
            from llmtrain.cli.completion import complete

            return complete(arguments)
        if not arguments or arguments[0] in ("-h", "--help", "help"):
            print(overview(), flush=True)
            return FINISHED
        if arguments[0] in ("-V", "--version"):
            print(f"llmtrain {__version__}", flush=True)
            return FINISHED
        from llmtrain.cli.dispatch import dispatch

        status = dispatch(parse(arguments))
        sys.stdout.flush()
        return status
    except KeyboardInterrupt as error:
        complain("llmtrain: stopped")
        if (session := sys.modules.get("llmtrain.distributed.session")) is not None:
            session.abandon_run(error, STOPPED)
        return STOPPED
    except Exception as error:
        if isinstance(error, BrokenPipeError) and error.filename is None:  # … --cfg job | head: nobody reads any more
            silence(1)
            return FAILED
        flush_standard_output()
        status = report_error(error, arguments)
        if (session := sys.modules.get("llmtrain.distributed.session")) is not None:
            session.abandon_run(error, status)
        return status


def report_error(error: Exception, arguments: Sequence[str]) -> int:
    """Print one message for ``error``, with a traceback for a bug or under ``--debug``; returns the exit status."""
    import traceback

    from llmtrain.cli.errors import explain

    debug = "--debug" in arguments
    if debug:
        complain(traceback.format_exc())
    message, status = explain(error, next((verb for verb in arguments if verb in VERBS), "train"), arguments)
    if message is not None:
        complain(shortened("; ".join([f"llmtrain: {message}", *getattr(error, "__notes__", [])])))
    elif not debug:
        complain(traceback.format_exc() + "llmtrain: this is a bug; the traceback above shows where")
    return status


def complain(text: str) -> None:
    """Print to stderr, without secrets; control characters, as in a file name, are shown instead of obeyed."""
    try:
        print(visible(hide(text)), file=sys.stderr, flush=True)
    except OSError:  # nobody reads it: the terminal is gone
        silence(2)


def shortened(message: str) -> str:
    """Return a message with the middle of long words left out, as of an argument of thousands of characters."""
    return re.sub(r"\S{401,}", lambda word: f"{word[0][:200]}…{word[0][-100:]}", message)
