"""What the fault tests train, how they wait for a moment, and what must hold of a run after any fault."""

import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import safe_open

from llmtrain.checkpoint.format import verify_checkpoint
from tests.helpers.cli import TINY, rows
from tests.helpers.launcher import Victim

ROOT = Path(__file__).parents[2]
TEXT_BYTES = 3000  # 84 training sequences: an epoch is 21 steps
# Dropout and shuffling draw random numbers, looking must not; the reference of all is one undisturbed run.
STANDARD = (
    *(argument for argument in TINY if not argument.startswith("loop.")),
    "data=text", "data.path=text.txt", "data.validation_fraction=0.1", "model.dropout=0.1", "loop.max_steps=80",
    "loop.eval_every=6", "loop.sample_every=20", "loop.sample_tokens=8",
)  # fmt: skip
LAST = 80
FILES = ("model.safetensors", "optimizer.safetensors", "state.json", "config.yaml", "manifest.json")
TIME = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"
LOG_LINE = re.compile(TIME + "(  .*)?")
SAME = ("tokens", "epoch", "loss", "learning_rate", "grad_norm", "grad_max", "val_loss", "batch_size")


def prepare(folder: Path) -> Path:
    """A working directory with the text to train on, and the plug-ins of these tests."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "text.txt").write_text((ROOT / "data" / "lighthouse.txt").read_text()[:TEXT_BYTES])
    shutil.copy(Path(__file__).parent / "objectives.py", folder)
    return folder


# --- waiting for a moment -------------------------------------------------------------------------------------------


def comes(condition: Callable[[], Any], victim: Victim, *, seconds: float = 60) -> Any:
    """Wait until ``condition()`` is true, and return it; what is not true if the victim ends before.

    Fails after so many seconds.
    """
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        if not victim.is_running():
            return condition()
        assert time.monotonic() < deadline, f"waited {seconds:g} s in vain\n{victim.text()}"
        time.sleep(0.003)
    return found


def wait_for(what: str, condition: Callable[[], Any], victim: Victim) -> Any:
    """Wait until ``condition()`` is true, and return it.  Fails if the victim ends before."""
    found = comes(condition, victim)
    assert found, f"ended with {victim.returncode} before {what}\n{victim.text()}"
    return found


def steps(run_dir: Path) -> list[int]:
    """The steps of the checkpoints that there are, oldest first."""
    return sorted(int(path.name.removeprefix("step-")) for path in (run_dir / "checkpoints").glob("step-*"))


def unfinished_saves(victim: Victim, run_dir: Path) -> list[Path]:
    """Checkpoints that the victim is writing, or was when it ended; not what an earlier process has left."""
    return list((run_dir / "checkpoints").glob(f".tmp-step-*-{victim.pid}"))


def whole_rows(run_dir: Path) -> list[dict[str, Any]]:
    """The metrics of a run that may be writing one."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith(b"\n")]


def events(run_dir: Path, name: str) -> list[dict[str, Any]]:
    """The rows of an event."""
    return [row for row in whole_rows(run_dir) if row.get("event") == name]


def newest_row(run_dir: Path) -> int:
    """The newest step that has a row in the metrics; 0 before the first."""
    return max((row["step"] for row in whole_rows(run_dir) if "loss" in row), default=0)


def wait_for_step(victim: Victim, run_dir: Path, step: int) -> None:
    """Wait until the metrics have a row of ``step`` or a later one."""
    wait_for(f"step {step}", lambda: newest_row(run_dir) >= step, victim)


def hold_in_a_save(victim: Victim, run_dir: Path, *, after: int = 0, seconds: float = 0.0) -> bool:
    """Stop the victim while it writes a checkpoint, the one after step ``after``, ``seconds`` into it.

    False where the victim ended before.
    """
    deadline = time.monotonic() + 60
    while victim.is_running():
        assert time.monotonic() < deadline, f"no save was met in 60 s\n{victim.text()}"
        if any(int(path.name.split("-")[2]) > after for path in unfinished_saves(victim, run_dir)):
            time.sleep(seconds)
            victim.hold()
            if victim.is_running() and unfinished_saves(victim, run_dir):
                return True
            victim.release()
            after = max(steps(run_dir), default=after)
        time.sleep(0.0001)
    return False


# --- what must hold -------------------------------------------------------------------------------------------------


def files_of(checkpoint: Path) -> tuple[str, ...]:
    """The files that a checkpoint must have: the five of one process, or an index and those that it names."""
    if not (checkpoint / "index.json").exists():
        return FILES
    index = json.loads((checkpoint / "index.json").read_text())
    boxes = [box for group in index.values() for tensor in group.values() for box in tensor["boxes"]]
    return (*sorted({box["file"] for box in boxes}), "index.json", *FILES[2:])


def assert_whole(checkpoint: Path) -> None:
    """A checkpoint has its files, each as the manifest says, and they can be read.

    Judged twice: by code of these tests, and by the program's.
    """
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    files = files_of(checkpoint)
    assert {path.name for path in checkpoint.iterdir()} == set(files), checkpoint
    assert set(manifest["files"]) == set(files) - {"manifest.json"}
    for name, entry in manifest["files"].items():
        content = (checkpoint / name).read_bytes()
        assert len(content) == entry["bytes"], checkpoint / name
        assert hashlib.sha256(content).hexdigest() == entry["sha256"], checkpoint / name
    for name in (name for name in files if name.endswith(".safetensors")):
        with safe_open(checkpoint / name, framework="numpy") as file:
            for key in file.keys():  # noqa: SIM118 - it is no dictionary
                file.get_slice(key).get_shape()
    step = json.loads((checkpoint / "state.json").read_text())["step"]
    assert checkpoint.name == f"step-{step:08d}"
    assert manifest["step"] == step
    verify_checkpoint(checkpoint)


def assert_all_whole(run_dir: Path) -> list[int]:
    """Every checkpoint is whole; returns their steps."""
    found = steps(run_dir)
    for step in found:
        assert_whole(run_dir / "checkpoints" / f"step-{step:08d}")
    return found


def assert_same_rows(one: Path, other: Path) -> None:
    """Both runs have logged every step and evaluation once, in order, with the same numbers, and the same samples."""
    first, second = ([row for row in rows(run) if "event" not in row] for run in (one, other))
    assert [row["step"] for row in first] == [row["step"] for row in second]
    for left, right in zip(first, second, strict=True):
        assert {key: left.get(key) for key in SAME} == {key: right.get(key) for key in SAME}
    left, right = ((run / "samples.jsonl") for run in (one, other))
    assert left.exists() == right.exists()
    assert not left.exists() or left.read_bytes() == right.read_bytes()


def assert_log_whole(run_dir: Path, *, torn: int = 0) -> None:
    """No line of ``train.log`` or ``metrics.jsonl`` is torn, or has another one in it.

    But for ``torn`` lines of the log, each the last of a process that ended on a full disk.
    """
    log = (run_dir / "train.log").read_text(encoding="utf-8")
    assert log.endswith("\n")
    odd = [line for line in log.splitlines() if not LOG_LINE.fullmatch(line)]
    assert len(odd) <= torn, f"torn lines in train.log: {odd}"
    for line in log.splitlines():
        assert len(re.findall(TIME, line)) <= 1, f"two lines in one in train.log: {line!r}"
    assert (run_dir / "metrics.jsonl").read_bytes().endswith(b"\n")
    rows(run_dir)
