"""Every command on runs whose checkpoints several ranks have written: what it does for a run of one process."""

import shutil
from pathlib import Path

import pytest
import torch

from llmtrain import Run
from llmtrain.base.tensor_files import CheckpointError
from llmtrain.checkpoint.format import verify_checkpoint
from llmtrain.checkpoint.stored_tensors import is_sharded, read_group
from llmtrain.cli.main import main
from llmtrain.config.assemble import assemble
from tests.helpers.cli import TINY, assert_same_end
from tests.helpers.sharding import shard_run

TEXT = Path(__file__).parents[2] / "data" / "lighthouse.txt"
SMALL = (
    *TINY, "checkpoint.every_steps=2", "checkpoint.keep_last=0", "data=text", f"data.path={TEXT}",
    "data.validation_fraction=0.1",
)  # fmt: skip
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process with checkpoints of the steps 2 and 4."""
    folder = tmp_path_factory.mktemp("runs")
    return Run.compose(*SMALL, "loop.max_steps=4", "model.dropout=0.1", f"run_dir={folder / 'alone'}").train().run_dir


@pytest.fixture(scope="module")
def sharded(alone: Path) -> Path:
    """The same run, its checkpoints written by three ranks.  To be read."""
    run = Path(shutil.copytree(alone, alone.with_name("sharded")))
    shard_run(run, 3)
    assert all(is_sharded(path) for path in (run / "checkpoints").iterdir())
    return run


def test_a_sharded_run_verifies_to_the_bit(sharded: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(sharded), "device=cpu"]) == 0
    assert "verified, bit for bit" in capfd.readouterr().out


def test_verify_names_a_damaged_shard(sharded: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = Path(shutil.copytree(sharded, tmp_path / "run"))
    shard = run / "checkpoints" / "step-00000004" / "optimizer-00002-of-00003.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert main(["verify", str(run), "device=cpu"]) == 1
    assert f"{shard}: its sha256" in capfd.readouterr().out
    assert main(["resume", str(run), "loop.max_steps=5"]) == 0  # from the intact one before
    assert f"{shard}: its sha256" in capfd.readouterr().out


def test_text_and_exports_are_those_of_the_run_of_one_process(
    alone: Path, sharded: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    texts = []
    for run in (alone, sharded, sharded / "checkpoints" / "step-00000004"):
        assert main(["generate", str(run), "prompt=It's a lamp", "max_tokens=30", "device=cpu"]) == 0
        texts.append(capfd.readouterr().out)
    assert texts[0] == texts[1] == texts[2]
    for run in (alone, sharded):
        assert main(["export", str(run), f"to={tmp_path / run.name}"]) == 0
    one, other = ((tmp_path / run.name / "model.safetensors").read_bytes() for run in (alone, sharded))
    assert one == other
    assert main(["report", str(sharded)]) == 0
    assert "sharded" in capfd.readouterr().out


def test_a_resumed_run_and_a_branch_end_as_the_run_of_one_process(alone: Path, sharded: Path, tmp_path: Path) -> None:
    runs = [Path(shutil.copytree(run, tmp_path / run.name)) for run in (alone, sharded)]
    for run in runs:
        assert main(["resume", str(run), "loop.max_steps=6"]) == 0
        branch = f"run_dir={tmp_path / run.name}-branch"
        assert main(["resume", str(run), "step=2", branch, "loop.max_steps=3"]) == 0
    assert_same_end(*runs)
    branches = [tmp_path / f"{run.name}-branch" for run in runs]
    assert_same_end(*branches)
    copy = branches[1] / "checkpoints" / "step-00000002"
    assert is_sharded(copy)
    verify_checkpoint(copy)


def test_weights_and_adapters_are_taken_from_sharded_runs(alone: Path, sharded: Path, tmp_path: Path) -> None:
    models = []
    for run in (alone, sharded):
        start = Run.compose(*SMALL, "weights=checkpoint", f"weights.path={run}", "runtime.seed=9")
        models.append(assemble(start, CPU).unit.weights_state())
    assert models[0].keys() == models[1].keys()
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])

    keys = (*SMALL, "weights=checkpoint", f"weights.path={sharded}", "lora=lora", "lora.rank=4")
    first = Run.compose(*keys, "loop.max_steps=2", f"run_dir={tmp_path / 'first'}").train().run_dir
    adapters = read_group(first / "checkpoints" / "step-00000002", "model")
    shard_run(first, 2)
    again = assemble(Run.compose(*keys, f"lora.path={first}", "loop.max_steps=1"), CPU)
    there = dict(again.unit.named_weights())
    assert adapters
    assert all(torch.equal(there[name], tensor) for name, tensor in adapters.items())
    with pytest.raises(CheckpointError, match=r"index\.json: does not fit lora\.targets"):
        assemble(Run.compose(*keys, f"lora.path={first}", "lora.targets=[qkv,up]", "loop.max_steps=1"), CPU)
    assert main(["resume", str(first), "loop.max_steps=3"]) == 0
    assert main(["generate", str(first), "prompt=Sea", "max_tokens=5", "device=cpu"]) == 0


def test_a_sharded_checkpoint_of_another_model_is_refused_by_name(sharded: Path) -> None:
    run = Run.compose(*SMALL, "model.hidden_size=64", "weights=checkpoint", f"weights.path={sharded}")
    with pytest.raises(CheckpointError, match=r"index\.json: does not fit the model: token_embedding\.weight is \("):
        assemble(run, CPU)
