"""The start of the program: the verb and the allocator decide on a restart before anything heavy is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from llmtrain.base.process import MARK, Allocator, is_glibc
from llmtrain.cli.start import requested_allocator, split_verb

PROGRAM = """
import os, sys
from llmtrain.cli.start import restart_if_needed
print(os.getpid(), flush=True)
restart_if_needed(sys.argv[1:])
assert not {"hydra", "omegaconf", "yaml", "numpy", "torch"} & set(sys.modules)
print(os.environ.get("GLIBC_TUNABLES", ""))
"""


def start(folder: Path, *arguments: str, **variables: str) -> tuple[int, str]:
    """Run the program; returns its number of starts and the tunables that it ends with."""
    (folder / "program.py").write_text(PROGRAM)
    environment = {name: value for name, value in os.environ.items() if name not in ("GLIBC_TUNABLES", MARK)}
    done = subprocess.run([sys.executable, "program.py", *arguments], cwd=folder, env=environment | variables,
                          capture_output=True, text=True, check=True)  # fmt: skip
    *pids, tunables = done.stdout.splitlines()
    assert len(set(pids)) == 1  # a parent that waits for the process still does
    return len(pids), tunables


@pytest.mark.skipif(not is_glibc(), reason="malloc is not glibc's")
@pytest.mark.parametrize(
    ("arguments", "starts"),
    [
        (["train", "model=tiny"], 2),
        (["--debug", "plan"], 2),
        (["report", "train"], 1),
        (["generate", "resume", "prompt=train"], 1),
        (["train", "runtime.allocator=system"], 1),
        (["train", "--help"], 1),
        (["train", "--cfg=job"], 1),
        ([], 1),
    ],
)
def test_only_a_verb_that_trains_with_a_tuned_allocator_restarts(
    tmp_path: Path, arguments: list[str], starts: int
) -> None:
    tunables = "glibc.malloc.tcache_count=0" if starts == 2 else ""
    assert start(tmp_path, *arguments) == (starts, tunables)


@pytest.mark.skipif(not is_glibc(), reason="malloc is not glibc's")
def test_a_job_with_the_system_allocator_drops_what_its_parent_has_set(tmp_path: Path) -> None:
    ours = {"GLIBC_TUNABLES": "glibc.malloc.arena_max=2:glibc.malloc.tcache_count=0"}
    assert start(tmp_path, "resume", "runtime.allocator=system", **ours, **{MARK: "1"}) == (
        2,
        "glibc.malloc.arena_max=2",
    )
    users = ours["GLIBC_TUNABLES"]  # without our mark
    assert start(tmp_path, "resume", "runtime.allocator=system", **ours) == (1, users)


def test_the_verb_is_the_first_argument_beside_debug() -> None:
    assert split_verb(["--debug", "report", "train"]) == ("report", ["train"])
    assert split_verb(["report", "--debug"]) == ("report", [])
    assert split_verb([]) == ("", [])


@pytest.mark.parametrize("verb", ["resume", "verify"])
def test_the_allocator_of_a_stored_run_is_its_own_unless_the_command_line_has_another(
    tmp_path: Path, verb: str
) -> None:
    stored = {"name": "x", "runtime": {"_target_": "llmtrain.base.runtime.Runtime", "seed": 1, "allocator": "system"},
              "loop": {"max_steps": 3}}  # fmt: skip
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(yaml.safe_dump(stored, sort_keys=False))
    assert requested_allocator(verb, [str(run)]) is Allocator.system
    assert requested_allocator(verb, [str(run), "runtime.allocator=tuned"]) is Allocator.tuned
    del stored["runtime"]["allocator"]  # type: ignore[attr-defined]
    stored["loop"]["allocator"] = "system"  # type: ignore[index]
    (run / "config.yaml").write_text(yaml.safe_dump(stored, sort_keys=False))  # as an older version wrote it
    assert requested_allocator(verb, [str(run)]) is Allocator.tuned
    assert requested_allocator(verb, [str(tmp_path / "nowhere")]) is Allocator.tuned


def test_the_allocator_follows_the_device_where_it_is_automatic(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmtrain.base.process.takes_gpu", lambda device: device != "cpu")  # a machine with a GPU
    tuned, system = Allocator.tuned, Allocator.system
    assert requested_allocator("train", []) is system
    assert requested_allocator("train", ["runtime.device=cuda:1"]) is system
    assert requested_allocator("train", ["runtime.device=cpu"]) is tuned
    assert requested_allocator("train", ["runtime.allocator=tuned"]) is tuned
    assert requested_allocator("verify", [str(tmp_path), "device=cpu"]) is tuned
    runtime = {"_target_": "llmtrain.base.runtime.Runtime", "device": "cpu", "seed": 1, "allocator": "auto"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"name": "x", "runtime": runtime}, sort_keys=False))
    assert requested_allocator("resume", [str(tmp_path)]) is tuned
    assert requested_allocator("resume", [str(tmp_path), "runtime.device=auto"]) is system
    runtime |= {"device": "cuda:1", "allocator": "tuned"}  # as older versions stored it
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"name": "x", "runtime": runtime}, sort_keys=False))
    assert requested_allocator("resume", [str(tmp_path)]) is tuned
