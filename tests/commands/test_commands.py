"""plan, generate and report through the command line."""

import shutil
from pathlib import Path

import pytest
import torch
import yaml

from llmtrain import Run
from llmtrain.base.run_files import CONFIG, MODEL, OPTIMIZER
from llmtrain.base.tensor_files import read_tensors
from llmtrain.checkpoint.directory import locate_checkpoint
from llmtrain.checkpoint.format import read_state, write_checkpoint
from llmtrain.cli.main import main
from llmtrain.config import stored_config
from llmtrain.config.assemble import assemble
from tests.helpers.cli import TINY


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of three steps.  To be copied, not touched."""
    run_dir = tmp_path_factory.mktemp("made") / "run"
    return Run.compose(*TINY, "loop.max_steps=3", "loop.eval_every=2", f"run_dir={run_dir}").train().run_dir


@pytest.fixture
def run_dir(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(made, tmp_path / "run"))


def test_plan_counts_the_steps_of_epochs(capfd: pytest.CaptureFixture[str]) -> None:
    overrides = ("model=tiny", "tokenizer=byte", "loop.max_steps=null", "loop.epochs=1", "accumulation=ramp")
    assert main(["plan", *overrides]) == 0
    output = capfd.readouterr().out
    assert "at first" in output
    assert "1.0" in output


def test_generate_is_reproducible(run_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    texts = []
    for target in (run_dir, run_dir, run_dir / "checkpoints" / "step-00000003"):
        assert main(["generate", str(target), "prompt=It's a lamp, [at] night", "max_tokens=30", "device=cpu"]) == 0
        texts.append(capfd.readouterr().out)
    assert texts[0].startswith("It's a lamp, [at] night")
    assert len(texts[0]) > 30
    assert texts[0] == texts[1] == texts[2]
    assert main(["generate", str(run_dir), "prompt=It's a lamp, [at] night", "max_tokens=30", "seed=2"]) == 0
    assert capfd.readouterr().out != texts[0]


def test_generate_reads_a_checkpoint_of_an_older_version(
    run_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its config lacks groups and keys of today."""
    path = run_dir / "checkpoints" / "step-00000003"
    stored = stored_config.load(path / CONFIG)
    del stored["activation_checkpointing"], stored["loop"]["eval_every"]
    older = tmp_path / "step-00000003"
    model, optimizer = (read_tensors(path / name) for name in (MODEL, OPTIMIZER))
    write_checkpoint(older, model=model, optimizer=optimizer, state=read_state(path), config=yaml.safe_dump(stored))
    texts = []
    for target in (path, older):
        assert main(["generate", str(target), "prompt=Sea", "max_tokens=5", "device=cpu"]) == 0
        texts.append(capfd.readouterr().out)
    assert texts[0] == texts[1]


def test_generate_writes_as_many_samples_as_asked(run_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(run_dir), "prompt=Sea", "num_samples=3", "max_tokens=5", "temperature=1"]) == 0
    assert capfd.readouterr().out.count("Sea") == 3


@pytest.mark.parametrize(
    "text", ["plain", "a, b", "It's", "[x]", "{y: 1}", "back\\slash", "end\\", 'say "hi"', "it\\'s", "a=b", " spaces "]
)
def test_free_text_reaches_the_program_as_typed(text: str) -> None:
    run = Run.compose(*TINY, f"loop.sample_prompt={text}")
    assert run.loop.sample_prompt == text


def test_report_shows_the_state_of_a_run(run_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(run_dir)]) == 0
    output = capfd.readouterr().out
    assert "finished" in output
    assert "run" in output


def test_a_run_starts_from_the_weights_of_another(run_dir: Path, tmp_path: Path) -> None:
    run = Run.compose(*TINY, "weights=checkpoint", f"weights.path={run_dir}", "runtime.seed=9")
    model = assemble(run, torch.device("cpu")).unit.model
    run.weights.load(model)
    source = read_tensors(locate_checkpoint(run_dir) / MODEL)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in source.items())
    result = Run.compose(*TINY, "weights=checkpoint", f"weights.path={run_dir}", "loop.max_steps=1",
                         f"run_dir={tmp_path / 'next'}").train()  # fmt: skip
    assert result.summary["step"] == 1


def test_weights_of_other_shapes_are_refused_by_name(run_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *TINY, "model.hidden_size=64", "weights=checkpoint", f"weights.path={run_dir}"]) == 2
    assert "does not fit the model: token_embedding.weight is (257, 32)" in capfd.readouterr().err
