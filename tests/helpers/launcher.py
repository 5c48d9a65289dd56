"""Starting the command line in a process of its own in milliseconds: a process that has imported everything forks.

What is forked runs ``llmtrain.cli.main.main``, and what was to be done at the exit, as ``python -m llmtrain`` does; the
imports, seconds of them, are saved, what else a process does but once, and taking it all apart in the end.
:class:`Launcher` and its server speak JSON, a packet a message.
"""

import atexit
import gc
import io
import json
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self

FOLDER = Path(__file__).parent
PACKET_BYTES = 1 << 17


@dataclass
class Victim:
    """A process that runs the command line."""

    arguments: tuple[str, ...]
    output: Path  # what it wrote, to stdout and stderr
    errors: Path  # what it wrote to stderr: the same file, unless told apart
    pid: int = 0
    returncode: int | None = None  # as of subprocess: negative for the signal that ended it
    began: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)

    def text(self) -> str:
        """What it has written so far."""
        return self.output.read_text(encoding="utf-8", errors="replace")

    def is_running(self) -> bool:
        """Whether it has not ended yet."""
        return not self.ended.is_set()

    def send(self, number: int) -> None:
        """Send a signal, if it has not ended."""
        if self.is_running():
            os.kill(self.pid, number)

    def hold(self) -> None:
        """Stop it where it is, all threads; returns when they stand still, or it has ended."""
        self.send(signal.SIGSTOP)
        while self.is_running() and not self._stands_still():
            time.sleep(0.0005)

    def _stands_still(self) -> bool:
        try:
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] in "TZ"
        except OSError:  # it has ended
            return False

    def release(self) -> None:
        """Let it go on."""
        self.send(signal.SIGCONT)

    def limit_files(self, num_bytes: int | None) -> None:
        """From now on no file may become longer: writing more fails as on a full disk.  None: no limit."""
        hard = resource.prlimit(self.pid, resource.RLIMIT_FSIZE)[1]
        resource.prlimit(self.pid, resource.RLIMIT_FSIZE, (hard if num_bytes is None else num_bytes, hard))

    def kill(self) -> None:
        """End it at once, and wait for that."""
        self.send(signal.SIGKILL)
        self.ended.wait()

    def wait(self, status: int | None = None, *, seconds: float = 120) -> str:
        """Wait for the end; returns what it wrote.  Fails after so many seconds, or if it exits not with ``status``."""
        if not self.ended.wait(seconds):
            self.kill()
            raise AssertionError(f"{' '.join(self.arguments)}: still running after {seconds:g} s\n{self.text()}")
        assert status in (None, self.returncode), (
            f"{' '.join(self.arguments)}: exit status {self.returncode}, not {status}\n{self.text()}"
        )
        return self.text()


class Launcher:
    """Starts victims in ``folder`` unless told otherwise; those that still run end with it.  A context manager.

    What they write goes to files in ``folder`` as well.  ``wrapper`` is a command that runs the server, such as
    ``unshare``.
    """

    def __init__(
        self, folder: Path, *, environment: Mapping[str, str] | None = None, wrapper: Sequence[str] = ()
    ) -> None:
        self.folder = folder
        self.environment = dict(environment or {})
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [*wrapper, sys.executable, __file__, str(theirs.fileno())]
        # OpenBLAS would start threads, and a process with threads must not fork
        process_environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"} | self.environment
        self.process = subprocess.Popen(
            command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            env=process_environment,
        )  # fmt: skip
        theirs.close()
        self._starting: list[Victim] = []
        self._running: dict[int, Victim] = {}
        self._outputs = 0
        self._lock = threading.Lock()
        self.ready = threading.Event()
        self._reader = threading.Thread(target=self._listen, daemon=True)
        self._reader.start()

    def start(
        self,
        *arguments: str,
        cwd: Path | None = None,
        environment: Mapping[str, str] | None = None,
        file_bytes: int | None = None,
        prelude: str = "",
        apart: bool = False,
    ) -> Victim:
        """Start the command line with ``arguments``.

        ``environment`` is added to that of this process, ``file_bytes`` limits the length of files that it writes,
        ``prelude`` is Python that runs before.  ``apart``: stderr has a file of its own.
        """
        assert self.ready.wait(120), "the launcher does not get ready"
        assert self.process.poll() is None, f"the launcher ended with {self.process.returncode}"
        with self._lock:
            self._outputs += 1
            output = self.folder / f"output-{self._outputs}.txt"
            errors = self.folder / f"errors-{self._outputs}.txt" if apart else output
            victim = Victim(arguments, output, errors)
            output.touch()
            errors.touch()
            self._starting.append(victim)
            request = {
                "arguments": list(arguments), "cwd": str(cwd or self.folder), "output": str(output.absolute()),
                "errors": str(errors.absolute()), "file_bytes": file_bytes, "prelude": prelude,
                "environment": {**os.environ, **self.environment, **(environment or {})},
            }  # fmt: skip
            packet = json.dumps(request).encode()
            assert len(packet) < PACKET_BYTES
            self._channel.send(packet)
        assert victim.began.wait(60), "the launcher does not answer"
        return victim

    def run(self, *arguments: str, status: int = 0, **options: Any) -> str:
        """Run the command line to its end, which must come with ``status``; returns what it wrote."""
        return self.start(*arguments, **options).wait(status)

    def _listen(self) -> None:
        while packet := self._channel.recv(PACKET_BYTES):
            message = json.loads(packet)
            if message.get("ready"):
                self.ready.set()
            elif "status" in message:
                victim = self._running.pop(message["pid"])
                victim.returncode = message["status"]
                victim.ended.set()
            else:
                victim = self._starting.pop(0)
                victim.pid = message["pid"]
                self._running[victim.pid] = victim
                victim.began.set()
        self.ready.set()  # for whoever waits for a server that could not even start

    def close(self) -> None:
        """End the server and with it all victims."""
        self._channel.shutdown(socket.SHUT_RDWR)
        self.process.wait(30)
        self._reader.join(30)
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


# --- the server -----------------------------------------------------------------------------------------------------


def serve(channel: socket.socket) -> int:
    """Fork a victim for each request until the channel is closed."""
    from llmtrain.base.process import prepare_process

    prepare_process()
    import torch._dynamo  # torch imports it on the way, a second of it
    import torch.distributed.fsdp
    import torch.distributed.pipelining
    import torch.distributed.tensor
    import torch.nn.parallel

    import llmtrain.commands.generate
    import llmtrain.commands.plan
    import llmtrain.commands.report
    import llmtrain.commands.resume
    import llmtrain.commands.train
    import llmtrain.commands.verify
    import llmtrain.report.curves
    import llmtrain.run.run
    import llmtrain.sweep.jobs  # noqa: F401
    from tests.helpers import forked_ranks

    forked_ranks.install(run_main)
    warm_up()
    assert torch.tensor(1.0).item() == 1.0
    assert len(os.listdir("/proc/self/task")) == 1, "a process with threads must not fork"  # noqa: PTH208
    gc.freeze()
    poll = select.poll()
    poll.register(channel, select.POLLIN)
    pids: dict[int, int] = {}  # by a descriptor that becomes readable when the process ends
    tell(channel, ready=True)
    while True:
        for descriptor, _ in poll.poll():
            if descriptor in pids:
                pid = pids.pop(descriptor)
                poll.unregister(descriptor)
                os.close(descriptor)
                tell(channel, pid=pid, status=os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
                continue
            packet = channel.recv(PACKET_BYTES)
            if not packet:
                return 0
            if (pid := os.fork()) == 0:
                channel.close()
                for inherited in pids:
                    os.close(inherited)
                become_victim(json.loads(packet))
            descriptor = os.pidfd_open(pid)
            pids[descriptor] = pid
            poll.register(descriptor, select.POLLIN)
            tell(channel, pid=pid)


def warm_up() -> None:
    """Do the work of a process's start: look for Hydra's plug-ins and for fonts, read conf/ and the topics of Python's
    documentation, learn the grammar of overrides, measure what the processor can do.  Make the libraries quick."""
    import torch
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from llmtrain.base.device import peak_rate
    from llmtrain.config.compose import compose
    from llmtrain.config.folders import conf_dir
    from llmtrain.config.key_types import fields, target_of
    from llmtrain.data.python_docs import split_topics
    from llmtrain.precision.fp32 import FP32
    from tests.helpers import quick

    quick.install()
    for target in filter(None, map(target_of, conf_dir().rglob("*.yaml"))):
        fields(target)
    split_topics(compose("train", [])["data"]["validation_fraction"], "python_docs")
    compose("train", ["model=tiny", "optimizer.lr=1e-3", "loop.sample_every=0", "run_dir=a/b", "plugins=[text]"])
    figure = Figure(layout="constrained")
    figure.subplots().set_title("bold", weight="bold")
    FigureCanvasAgg(figure).print_png(io.BytesIO())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # with more there would be threads, and a process with threads must not fork
    peak_rate(torch.device("cpu"), "bf16", torch.bfloat16)
    with FP32().build(torch.device("cpu")).arithmetic():
        peak_rate(torch.device("cpu"), "fp32", torch.float32)
    torch.set_num_threads(threads)


def tell(channel: socket.socket, **message: Any) -> None:
    """Send a message; nobody may be left to read it."""
    try:
        channel.send(json.dumps(message).encode())
    except BrokenPipeError:
        return


def become_victim(request: dict[str, Any]) -> NoReturn:
    """Run the command line as requested, and end with its exit status."""
    from tests.helpers.processes import die_with_parent

    die_with_parent()  # not to outlive the launcher
    os.environ.clear()
    os.environ.update(request["environment"])
    nothing = os.open(os.devnull, os.O_RDONLY)
    output = os.open(request["output"], os.O_WRONLY | os.O_APPEND)
    errors = os.open(request["errors"], os.O_WRONLY | os.O_APPEND)
    for source, target in ((nothing, 0), (output, 1), (errors, 2)):
        os.dup2(source, target)
        os.close(source)
    exec(request["prelude"], {})
    os.chdir(request["cwd"])
    folders = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:1] = ["", *(folder for folder in folders if folder and folder not in sys.path)]  # as with python -m
    if request["file_bytes"] is not None:
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_bytes"], hard))
    run_main(request["arguments"])


def run_main(arguments: Sequence[str]) -> NoReturn:
    """Run the command line, and end with its exit status."""
    from llmtrain.cli.main import main

    status = main(list(arguments))
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    sys.path.append(str(FOLDER.parents[1]))  # for the helpers beside this one
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where a shell started us in the background
    sys.exit(serve(socket.socket(fileno=int(sys.argv[1]))))
