"""The process that trains: device, threads, compilation."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llmtrain import Run
from llmtrain.base.device import measure_matmul_flops
from llmtrain.base.process import Allocator, is_glibc
from llmtrain.base.runtime import Device, Runtime
from llmtrain.base.threads import physical_cores
from tests.helpers.cli import TINY, rows


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")
def test_a_compiled_run_has_the_same_curve(tmp_path: Path) -> None:
    losses = []
    for compiled in ("false", "true"):
        run = Run.compose(*TINY, "loop.max_steps=5", "precision=fp32", f"runtime.compile={compiled}",
                          "loop.eval_every=4", f"run_dir={tmp_path / compiled}")  # fmt: skip
        values = [row.get("loss", row.get("val_loss")) for row in rows(run.train().run_dir) if "event" not in row]
        losses.append(values)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


TOLD = """
import os, sys
from llmtrain.base.process import restart_with_tunables
print(os.getpid(), flush=True)
restart_with_tunables()
print(sys.argv[1:], sys.flags.dev_mode, os.environ["GLIBC_TUNABLES"])
sys.exit(3)
"""


@pytest.mark.skipif(not is_glibc(), reason="malloc is not glibc's")
@pytest.mark.parametrize("before", [None, "glibc.malloc.arena_max=2", "glibc.malloc.tcache_count=7"])
def test_a_program_restarts_once_to_set_the_allocator(tmp_path: Path, before: str | None) -> None:
    (tmp_path / "program.py").write_text(TOLD)
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    environment |= {} if before is None else {"GLIBC_TUNABLES": before}
    done = subprocess.run([sys.executable, "-X", "dev", "program.py", "a b", "c=1"], cwd=tmp_path, env=environment,
                          capture_output=True, text=True)  # fmt: skip
    assert (done.returncode, done.stderr) == (3, "")
    *pids, last = done.stdout.splitlines()
    is_set = before is not None and "tcache_count" in before
    expected = before if is_set else ":".join([*([before] if before else []), "glibc.malloc.tcache_count=0"])
    assert len(pids) == (1 if is_set else 2)
    assert len(set(pids)) == 1  # whoever waits for the process still does
    assert last == f"['a b', 'c=1'] True {expected}"


OFF = {"compile": False, "cuda_graphs": False, "profile": False, "allocator": Allocator.tuned}


def test_a_session_leaves_torch_as_it_was() -> None:
    threads = torch.get_num_threads()
    runtime = Runtime(Device.cpu, seed=1, deterministic=True, num_threads=1, **OFF)
    with runtime.session() as device:
        assert device.type == "cpu"
        assert torch.get_num_threads() == 1
        assert torch.are_deterministic_algorithms_enabled()
    assert torch.get_num_threads() == threads
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_that_is_not_there_is_named() -> None:
    runtime = Runtime(Device.cuda, seed=1, deterministic=False, num_threads=None, **OFF)
    with pytest.raises(ValueError, match="device=cuda: torch sees no CUDA device here"):
        runtime.torch_device()


def test_measured_cores_and_flops_are_plausible() -> None:
    assert 1 <= physical_cores() <= 4096
    assert 1e8 < measure_matmul_flops(torch.device("cpu"), torch.float32) < 1e14
