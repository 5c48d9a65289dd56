"""What is to be measured: the command line of the harness."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

SUITES = ("matmul", "training", "gains", "lora", "start", "loader", "tokenizer", "checkpoint")
DEFAULT_SUITES = ("matmul", "training", "start", "loader", "tokenizer", "checkpoint")
PEERS = ("nanogpt", "hf_trainer", "litgpt")
MODES = tuple(f"{precision}{compiled}" for precision in ("fp32", "tf32", "bf16") for compiled in ("", "-compiled"))

# Where the command line says nothing, by device: a GPU's steps are short and overlap with the host's work.
BY_DEVICE = {
    "cpu": {"batch_sizes": [2], "steps": 4, "warm_up": 2, "block": 1, "save_every": 6},
    "cuda": {"batch_sizes": [16], "steps": 100, "warm_up": 20, "block": 10, "save_every": 100},
}


@dataclass(frozen=True)
class Settings:
    """The arguments, checked.  Of those in BY_DEVICE, 0 and [] stand for the device's."""

    suites: list[str]
    modes: list[str]
    peers: list[str]
    model: str
    tokenizer: str
    context: int
    batch_sizes: list[int]
    steps: int
    warm_up: int
    block: int
    save_every: int
    rounds: int
    device: str
    threads: int
    nanogpt: str | None
    peer_python: dict[str, str]
    overrides: list[str]
    variants: dict[str, list[str]]
    text: str | None
    cold: bool
    timeout_minutes: float

    @classmethod
    def from_arguments(cls, arguments: argparse.Namespace) -> Self:
        """Of a parsed command line.  Raises ValueError."""
        values = {field.name: getattr(arguments, field.name) for field in fields(cls)}
        values["variants"] = dict(map(_variant, arguments.variants))
        values["peer_python"] = dict(map(_interpreter, arguments.peer_python))
        for name in ("nanogpt", "text"):
            if values[name] is not None:
                values[name] = str(Path(values[name]).expanduser().absolute())
                if not Path(values[name]).exists():
                    raise ValueError(f"--{name} {values[name]}: no such file or folder")
        return cls(**values)

    def complete(self, device: str, threads: int) -> Self:
        """With the values of the device that was found.  Raises ValueError for blocks that do not come out even."""
        ours = asdict(self)
        values = ours | {"device": device, "threads": threads}
        values |= {key: value for key, value in BY_DEVICE[device].items() if not ours[key]}
        done = type(self)(**values)
        for key in ("steps", "warm_up"):
            if values[key] < 1 or values[key] % done.block:
                option = key.replace("_", "-")
                raise ValueError(f"--{option} {values[key]}: must be a positive multiple of --block {done.block}")
        return done

    def python_of(self, peer: str) -> str:
        """The interpreter that has the packages of a peer."""
        return self.peer_python.get(peer) or self.peer_python.get("") or sys.executable

    def to_json(self) -> dict[str, Any]:
        """A value for ``json.dump``."""
        return asdict(self)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Measure llmtrain beside others: paired, in turns, a process each."
    )
    add = parser.add_argument
    add("--suites", nargs="+", choices=SUITES, default=list(DEFAULT_SUITES), help="default: all but gains and lora")
    add("--modes", nargs="+", choices=MODES, default=["bf16", "bf16-compiled"])
    add(
        "--peers", nargs="*", choices=PEERS, default=list(PEERS), help="default: all; those that are not there are told"
    )
    add("--nanogpt", metavar="DIR", help="a checkout of nanoGPT")
    add("--peer-python", action="append", default=[], metavar="[PEER=]PATH", help="interpreter that has the peers")
    add("--model", default="gpt124m", help="our option; the peers take its sizes")
    add("--tokenizer", default="gpt2", help="our option")
    add("--context", type=int, default=1024, help="tokens of a sequence")
    add("--batch-sizes", type=int, nargs="+", default=[], help="sequences of a step; several: each is measured")
    add("--steps", type=int, default=0, help="measured steps a process")
    add("--warm-up", type=int, default=0, help="steps before them")
    add("--block", type=int, default=0, help="steps between two looks at the clock")
    add("--save-every", type=int, default=0, help="steps of a block with one save, for the suite checkpoint")
    add("--rounds", type=int, default=2)
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--threads", type=int, default=0, help="default: one a physical core")
    add("--override", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="for all runs of ours")
    add("--variant", dest="variants", action="append", default=[], metavar="NAME:KEY=VALUE ...",
        help="another contestant of ours, such as 'fp8: precision=fp8'")  # fmt: skip
    add("--text", metavar="FILE", help="UTF-8 text for the tokenisers (default: the sources of Python's library)")
    add("--cold", action="store_true", help="suite start: compiled modes too, with an empty cache and a full one")
    add("--timeout-minutes", type=float, default=30.0, help="for one process")
    add("--output", type=Path, default=Path(__file__).parent / "results")
    add("--resume", type=Path, metavar="JSON", help="go on with a run that was interrupted; takes its settings")
    add("--report", type=Path, metavar="JSON", help="write table and plot of a run again; measures nothing")
    return parser.parse_args(argv)


def _variant(text: str) -> tuple[str, list[str]]:
    name, colon, overrides = text.partition(":")
    if not colon or not name.strip() or not overrides.strip():
        raise ValueError(f"--variant {text!r}: must be NAME: KEY=VALUE ...")
    return name.strip(), overrides.split()


def _interpreter(text: str) -> tuple[str, str]:
    peer, _, path = text.rpartition("=")
    if peer and peer not in PEERS:
        raise ValueError(f"--peer-python {text}: no such peer; there are {', '.join(PEERS)}")
    absolute = Path(path).expanduser().absolute()  # not resolved: a venv's python is a link, and is known by its place
    if not absolute.exists():
        raise ValueError(f"--peer-python {text}: no such file")
    return peer, str(absolute)
