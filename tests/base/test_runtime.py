"""The process that trains: device, threads, compilation."""

import os
import shutil
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch

from llmtrain import Run
from llmtrain.base.device import measure_matmul_flops, unused_gpu_reason
from llmtrain.base.process import Allocator, is_glibc, takes_gpu
from llmtrain.base.runtime import Runtime, check_device
from llmtrain.base.threads import physical_cores
from tests.helpers.cli import TINY, rows
from tests.helpers.pretended_gpu import pretend_gpu


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
    runtime = Runtime("cpu", seed=1, deterministic=True, num_threads=1, **OFF)
    with runtime.session() as device:
        assert device.type == "cpu"
        assert torch.get_num_threads() == 1
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory  # which would write every new tensor once more
    assert torch.get_num_threads() == threads
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_that_is_not_there_is_named() -> None:
    runtime = Runtime("cuda", seed=1, deterministic=False, num_threads=None, **OFF)
    with pytest.raises(ValueError, match="device=cuda: torch sees no CUDA device here"):
        runtime.torch_device()


def test_measured_cores_and_flops_are_plausible() -> None:
    assert 1 <= physical_cores() <= 4096
    assert 1e8 < measure_matmul_flops(torch.device("cpu"), torch.float32) < 1e14


def test_the_gpu_is_chosen_by_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    entered = pretend_gpu(monkeypatch, count=2)
    for name, index in (("auto", 0), ("cuda", 0), ("cuda:1", 1)):
        with Runtime(name, seed=1, deterministic=False, num_threads=1, **OFF).session() as device:
            assert device == torch.device("cuda", index)
        assert entered.pop() == device  # for streams, events and kernels, which take the current one
    with Runtime("cpu", seed=1, deterministic=False, num_threads=1, **OFF).session() as device:
        assert device == torch.device("cpu")
    assert not entered


def test_a_number_without_a_gpu_is_refused_with_those_that_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch, count=2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    message = r"device=cuda:2: torch sees 2 GPUs, cuda:0 to cuda:1 \(CUDA_VISIBLE_DEVICES=3,5\); take one of these"
    with pytest.raises(ValueError, match=message):
        Runtime("cuda:2", seed=1, deterministic=False, num_threads=1, **OFF).torch_device()


@pytest.mark.parametrize("name", ["cuda:", "cuda:x", "cuda:-1", "CUDA", "tpu", ""])
def test_a_device_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"device={name}: must be one of auto, cpu, cuda, or cuda:1"):
        check_device(name)


def test_a_gpu_that_torch_cannot_use_is_named_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("llmtrain.base.device.nvidia_gpus", lambda: ["nvidia0"])
    monkeypatch.setattr(torch.version, "cuda", None)
    reason = str(unused_gpu_reason())
    assert reason.startswith("training on the CPU: this machine has an NVIDIA GPU, but torch ")
    assert "was installed without CUDA; a build of torch with CUDA would use it" in reason
    with pytest.raises(ValueError, match=r"device=cuda: this machine has an NVIDIA GPU, .* take cpu or auto"):
        Runtime("cuda", seed=1, deterministic=False, num_threads=1, **OFF).torch_device()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "a driver that is older than its CUDA 13.0" in str(unused_gpu_reason())


@pytest.mark.parametrize(("backend", "kind"), [("mps", "an Apple GPU"), ("xpu", "an Intel GPU")])
def test_gpus_of_other_makers_are_said_to_be_unused(monkeypatch: pytest.MonkeyPatch, backend: str, kind: str) -> None:
    monkeypatch.setattr("llmtrain.base.device.nvidia_gpus", list)
    assert torch.backends.mps.is_available() or torch.xpu.is_available() or unused_gpu_reason() is None
    monkeypatch.setattr(torch.backends.mps if backend == "mps" else torch.xpu, "is_available", lambda: True)
    assert f"torch sees {kind} ({backend})" in str(unused_gpu_reason())


@pytest.mark.parametrize(
    ("built_for", "device", "node", "visible", "takes"),
    [
        ("cuda: Optional[str] = '13.0'", "auto", "nvidia0", None, True),
        ("cuda: Optional[str] = '13.0'", "cuda:1", "nvidia1", "0,1", True),
        ("cuda: Optional[str] = '13.0'", "cpu", "nvidia0", None, False),
        ("cuda: Optional[str] = '13.0'", "auto", "nvidia0", "", False),
        ("cuda: Optional[str] = '13.0'", "auto", "nvidia0", "-1", False),
        ("cuda: Optional[str] = '13.0'", "auto", "nvidiactl", None, False),
        ("cuda: Optional[str] = None", "auto", "nvidia0", None, False),
        ("hip: Optional[str] = '7.1'", "auto", "kfd", None, True),
    ],
)
def test_malloc_is_left_alone_where_a_gpu_computes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, built_for: str, device: str, node: str, visible: str | None,
    takes: bool,
) -> None:  # fmt: skip
    """By the devices of the machine and the build of torch, which is read and not imported."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / node).touch()
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "version.py").write_text(f"__version__ = '2.13.0'\n{built_for}\n")
    spec = ModuleSpec("torch", None, origin=str(tmp_path / "torch" / "__init__.py"))
    monkeypatch.setattr("importlib.util.find_spec", {"torch": spec}.get)
    assert takes_gpu(device, tmp_path) is takes
    monkeypatch.setattr("llmtrain.base.process.takes_gpu", lambda device: takes)
    assert Allocator.auto.resolve(device) is (Allocator.system if takes else Allocator.tuned)
    assert Allocator.tuned.resolve(device) is Allocator.tuned


@pytest.mark.parametrize("name", [None, "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"])
def test_a_users_setting_of_torchs_allocator_is_kept(name: str | None) -> None:
    code = """
import os
from llmtrain.base.process import Allocator, prepare_process
prepare_process(Allocator.system)
print({name: value for name, value in os.environ.items() if name.endswith("_ALLOC_CONF")})
"""
    environment = {key: value for key, value in os.environ.items() if not key.endswith("_ALLOC_CONF")}
    environment |= {} if name is None else {name: "max_split_size_mb:64"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    expected = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"} if name is None else {name: "max_split_size_mb:64"}
    assert done.stdout.strip() == str(expected)
