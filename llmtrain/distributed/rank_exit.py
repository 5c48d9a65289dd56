"""The end of a rank, orderly or after an error, and its output.  Importing this module does not import torch."""

import contextlib
import datetime
import os
import socket
import sys
import threading
from pathlib import Path
from typing import NoReturn

from llmtrain.base.files import open_own
from llmtrain.base.invocation import FAILED
from llmtrain.base.world import World
from llmtrain.distributed.heartbeat import Heartbeat
from llmtrain.distributed.phases import Phase
from llmtrain.distributed.supervision import HEADING, Kind, Supervision, kind_of, log_name

TEARDOWN_SECONDS = 20.0  # of the process group, once all ranks have finished their work
FLUSH_SECONDS = 1.0


def leave(status: int, world: World, heartbeat: Heartbeat | None = None, *, step: int = 0) -> int:
    """Wait for the other ranks, end the process group and return ``status``; each rank that is well calls this.

    A process that ends without this is aborted by torch's threads: exit status 75 became -6.
    """
    if heartbeat is not None:
        heartbeat.mark(Phase.end, step)
        heartbeat.prepare_to_leave()
    world.barrier()
    if heartbeat is not None:
        heartbeat.close()
    import torch.distributed as dist

    if dist.is_initialized():
        watchdog = threading.Timer(TEARDOWN_SECONDS, lambda: end_now(status))
        watchdog.daemon = True
        watchdog.start()
        dist.destroy_process_group()
        watchdog.cancel()
    flush()
    return status


def abandon(
    error: BaseException | str,
    *,
    status: int = FAILED,
    supervision: Supervision | None = None,
    heartbeat: Heartbeat | None = None,
    is_shown: bool = True,
) -> NoReturn:
    """End this rank at once after an error that has been printed; neither a blocked collective nor a thread delays it.

    The supervisor and, where the error is this rank's own, the other ranks are told.  ``is_shown``: the message is on
    standard error.
    """
    if supervision is not None:
        supervision.report_failure(error, status=status, is_shown=is_shown)
    if heartbeat is not None and kind_of(error, status) is Kind.error:
        heartbeat.fail(str(error) or type(error).__name__)
    end_now(status)


def end_now(status: int) -> NoReturn:
    """Flush the output, as far as that does not block, and end the process without any cleanup."""
    thread = threading.Thread(target=flush, daemon=True)  # the main thread may be blocked while it holds a lock
    thread.start()
    thread.join(FLUSH_SECONDS)
    os._exit(status)


def flush() -> None:
    """Write what is in the buffers of standard output and error."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads it; closed
            stream.flush()


def redirect_output(ranks_folder: Path, rank: int, size: int) -> Path | None:
    """Append the output of this process, that of C++ too, to the rank's file in ``ranks_folder``; returns its path.

    That of rank 0 stays where it is.  Raises OSError if the file cannot be written, or is a link.
    """
    if rank == 0 or size == 1:
        return None
    ranks_folder.mkdir(exist_ok=True)
    path = ranks_folder / log_name(rank)
    descriptor = open_own(path, os.O_APPEND)
    flush()
    for number in (1, 2):
        os.dup2(descriptor, number)
    os.close(descriptor)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(line_buffering=True)
    now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    print(f"{HEADING}{rank} of {size} on {socket.gethostname()}, process {os.getpid()}, {now}", flush=True)
    return path
