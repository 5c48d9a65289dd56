"""Ranks that their supervisor forks: what it has imported need not be imported again, seconds of work for each rank."""

import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NoReturn

from llmtrain.distributed import rank_process

RunMain = Callable[[Sequence[str]], NoReturn]  # run the command line and end the process


def install(run_main: RunMain) -> None:
    """Have the ranks of this machine forked from now on; each does ``run_main(arguments)``."""

    class ForkedRank(subprocess.Popen[bytes]):
        """As ``subprocess.Popen``; the new process goes on in place of executing a program."""

        def __init__(
            self, command: Sequence[str], *, env: Mapping[str, str], preexec_fn: Callable[[], None], **options: Any
        ) -> None:
            assert list(command[:4]) == [sys.executable, "-P", "-m", "llmtrain"]

            def begin() -> None:
                preexec_fn()
                become_rank(command[4:], env, run_main)

            sys.stdout.flush()
            sys.stderr.flush()
            super().__init__(command, env=env, preexec_fn=begin, **options)

    names = {"Popen": ForkedRank, "STDOUT": subprocess.STDOUT, "DEVNULL": subprocess.DEVNULL}
    rank_process.subprocess = SimpleNamespace(**names)  # type: ignore[attr-defined]


def become_rank(arguments: Sequence[str], environment: Mapping[str, str], run_main: RunMain) -> NoReturn:
    """Make the state of a process that has just started, and run the command line."""
    import torch
    from hydra.core.global_hydra import GlobalHydra

    try:
        GlobalHydra.instance().clear()
        os.closerange(3, 1024)
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        os.environ.clear()
        os.environ.update(environment)
        if sys.path[0] == "":
            del sys.path[0]
        if "OMP_NUM_THREADS" in environment:
            torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
        run_main(arguments)
    except BaseException:
        traceback.print_exc()
    finally:  # the caller is not to go on in this process
        sys.stderr.flush()
        os._exit(70)
