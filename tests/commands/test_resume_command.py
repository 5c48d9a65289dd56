"""``llmtrain resume``: past damaged checkpoints, from named ones, into branches, with changes; and what is refused."""

import fcntl
import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmtrain import Run
from llmtrain.base.run_files import CONFIG, STATE
from llmtrain.base.tensor_files import read_tensors
from llmtrain.cli.main import main
from llmtrain.config import stored_config
from llmtrain.train.loop import Loop
from tests.helpers.cli import TINY, assert_same_end, cut_back, llmtrain, rows

TEXT = Path(__file__).parents[2] / "data" / "lighthouse.txt"
STEPS = 9


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of nine steps that has kept every checkpoint.  To be copied, not touched."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "text.txt").write_text(TEXT.read_text()[:735])
    data = ("data=text", f"data.path={folder / 'text.txt'}", f"data.cache_dir={folder / 'cache'}")
    every = ("checkpoint.every_steps=1", "checkpoint.keep_last=0", f"loop.max_steps={STEPS}", "model.dropout=0.1")
    looks = ("loop.eval_every=2", "loop.eval_batches=1", "loop.sample_every=3", "loop.sample_tokens=5")
    rate = ("optimizer.lr=2e-3", "schedule=warmup_linear", "schedule.warmup_ratio=0")
    overrides = (*TINY, *data, "data.validation_fraction=0.1", *every, *looks, *rate)
    return Run.compose(*overrides, f"run_dir={folder / 'run'}").train().run_dir


@pytest.fixture
def run(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the run, killed after its checkpoint of step 7; the working directory is where it lies."""
    monkeypatch.chdir(tmp_path)
    return cut_back(whole, 7, tmp_path / "run")


def checkpoint(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def damage(run: Path, step: int, name: str = "model.safetensors") -> None:
    path = checkpoint(run, step) / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def snapshot(folder: Path) -> dict[str, Any]:
    """Bytes and modification times of every file, but for the lock that a process of its own leaves."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def refused(capfd: pytest.CaptureFixture[str], *arguments: str, untouched: Path = Path("run")) -> str:
    """The one line that a command is refused with; it changes nothing and promises nothing before."""
    before = snapshot(untouched)
    capfd.readouterr()
    assert main(["resume", *arguments]) == 2
    shown = capfd.readouterr()
    assert snapshot(untouched) == before
    assert shown.out == ""
    (message,) = (line for line in shown.err.splitlines() if line.startswith("llmtrain: "))
    assert "Traceback" not in shown.err
    return message


def events(run: Path, name: str) -> list[dict[str, Any]]:
    return [row for row in rows(run) if row.get("event") == name]


def numbers(run: Path, up_to: int = STEPS) -> list[tuple]:
    """What was measured, without clocks."""
    kept = ("step", "tokens", "loss", "val_loss", "learning_rate", "grad_norm")
    found = (row for row in rows(run) if "event" not in row and row["step"] <= up_to)
    return [tuple(row.get(key) for key in kept) for row in found]


def environment(run: Path) -> dict[str, Any]:
    return json.loads((run / "environment.json").read_text())


# --- damaged checkpoints -----------------------------------------------------------------------------------------


def test_damaged_checkpoints_are_skipped_for_the_newest_intact_one(
    whole: Path, run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    damage(run, 7)
    (checkpoint(run, 6) / "manifest.json").unlink()
    assert main(["resume", "run"]) == 0
    output, log = capfd.readouterr().out, (run / "train.log").read_text()
    for text in (output, log):
        assert "step-00000007/model.safetensors: its sha256 is not the manifest's" in text
        assert "step-00000006: not a checkpoint (no manifest.json); passed over" in text
    assert output.index("passed over") < output.index("resume")
    damaged = events(run, "damaged")
    assert [row["step"] for row in damaged] == [5, 5]
    assert ["step-00000007" in row["message"] for row in damaged] == [True, False]
    assert [row["step"] for row in events(run, "resume")] == [5]
    assert_same_end(whole, run)  # also by the bytes of step 7, which was written anew
    assert numbers(run) == numbers(whole)
    assert environment(run)["resumes"][0]["from"] == "checkpoints/step-00000005"


def test_resume_without_an_intact_checkpoint_is_refused(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for step in range(1, 8):
        damage(run, step, STATE)
    message = refused(capfd, "run", "loop.max_steps=20")
    assert "no checkpoint to continue from, all are damaged" in message
    for step in range(1, 8):
        assert f"step-{step:08d}/state.json" in message


# --- named checkpoints -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments", [["run", "step=7"], ["run", "checkpoint.step=7"], ["run/checkpoints/step-00000007"]]
)
def test_naming_the_newest_checkpoint_resumes_in_place(whole: Path, run: Path, arguments: list[str]) -> None:
    assert main(["resume", *arguments]) == 0
    assert sorted(path.name for path in run.parent.iterdir()) == ["run"]
    assert_same_end(whole, run)


def test_a_named_checkpoint_that_is_damaged_is_refused(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for step in (5, 7):
        damage(run, step)
        assert f"step-{step:08d}/model.safetensors" in refused(capfd, "run", f"step={step}")
    damage(run, 3, CONFIG)
    assert "step-00000003/config.yaml" in refused(capfd, "run/checkpoints/step-00000003")
    assert sorted(path.name for path in run.parent.iterdir()) == ["run"]


def test_a_named_checkpoint_that_does_not_exist_is_refused(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(checkpoint(run, 4))
    for arguments in (["run", "step=4"], ["run/checkpoints/step-00000004"], ["run", "step=8"]):
        assert "those of the steps 1, 2, 3, 5, 6, 7" in refused(capfd, *arguments)
    assert "must be the step" in refused(capfd, "run", "step=last")
    assert "name one" in refused(capfd, "run/checkpoints/step-00000005", "step=6")


def test_a_checkpoint_without_its_run_is_refused(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(checkpoint(run, 5), "step-00000005")
    assert "a checkpoint without its run" in refused(capfd, "step-00000005")


def test_a_new_run_cannot_name_a_checkpoint(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for arguments, named in (
        (["train", "step=4"], "4"),
        (["train", "checkpoint.step=4"], "4"),
        (["train", "-m", "step=4,5"], "N"),
        (["train", "-m", "checkpoint.step=4,5"], "N"),
    ):
        assert main([*arguments, *TINY, f"output_dir={tmp_path / 'runs'}"]) == 2
        message = capfd.readouterr().err
        assert f"llmtrain resume RUN_DIR step={named}" in message
        assert "weights=checkpoint" in message
    assert list(tmp_path.iterdir()) == []


# --- branches ----------------------------------------------------------------------------------------------------


def test_a_branch_leaves_its_parent_unchanged(whole: Path, run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = snapshot(run)
    with (run / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a process works in the parent
        assert main(["resume", "run", "step=4", "optimizer.lr=1e-3", "name=slower", "output_dir=runs"]) == 0
    assert snapshot(run) == before
    (child,) = Path("runs").glob("*/slower-*")
    assert re.search(rf"(?m)^run +{child}, a branch of run at step 4$", capfd.readouterr().out)
    for name in (*(path.name for path in checkpoint(run, 4).iterdir()),):
        assert (checkpoint(child, 4) / name).samefile(checkpoint(run, 4) / name)
    assert numbers(child, 4) == numbers(whole, 4)
    assert numbers(child) != numbers(whole)
    samples = [json.loads(line)["step"] for line in (child / "samples.jsonl").read_text().splitlines()]
    assert samples == [3, 6, 9]
    saved = [row["step"] for row in events(child, "save")]
    assert sorted(saved) == list(range(1, STEPS + 1))
    stored = stored_config.load(child / CONFIG)
    assert (stored["optimizer"]["lr"], stored["name"]) == (1e-3, "slower")
    assert "step" not in {*stored, *stored["checkpoint"]}  # it says where to begin, once
    facts = environment(child)
    assert facts["parent"] == {"run": str(run.resolve()), "step": 4}
    (entry,) = facts["resumes"]
    assert entry["from"] == str(checkpoint(run, 4).resolve())
    assert ["optimizer.lr", 0.002, 0.001] in entry["changes"]
    assert json.loads((child / "summary.json").read_text())["step"] == STEPS


def test_a_branch_without_changes_ends_as_its_parent(whole: Path, run: Path) -> None:
    assert main(["resume", "run/checkpoints/step-00000002", "run_dir=again"]) == 0
    assert_same_end(whole, Path("again"))
    assert numbers(Path("again")) == numbers(whole)


def test_run_dir_alone_branches_from_the_newest_checkpoint(
    whole: Path, run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(run)
    assert main(["resume", "run", "run_dir=copy"]) == 0
    assert snapshot(run) == before
    assert environment(Path("copy"))["parent"]["step"] == 7
    assert_same_end(whole, Path("copy"))
    assert "run_dir=run: exists already" in refused(capfd, "run", "run_dir=run")
    assert "output_dir=elsewhere" in refused(capfd, "run", "output_dir=elsewhere")


def test_a_branch_starts_from_the_config_of_its_checkpoint(whole: Path, run: Path) -> None:
    """What its run was changed to later belongs to another continuation."""
    assert main(["resume", "run", "optimizer.lr=1e-4", "loop.max_steps=12"]) == 0
    assert main(["resume", "run", "step=6", "run_dir=as-before"]) == 0
    assert_same_end(whole, Path("as-before"))
    assert main(["resume", "run", "step=8", "run_dir=as-changed"]) == 0
    assert_same_end(run, Path("as-changed"))


def test_a_branch_can_be_branched(whole: Path, run: Path) -> None:
    assert main(["resume", "run", "step=2", "run_dir=one"]) == 0
    assert main(["resume", "one", "step=5", "run_dir=two"]) == 0
    assert environment(Path("two"))["parent"] == {"run": str(Path("one").resolve()), "step": 5}
    assert_same_end(whole, Path("two"))


def test_a_refused_branch_makes_no_directory(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for override in ("model.num_layers=1", "data.shuffle=false", "loop.max_steps=3"):
        key = override.split("=")[0]
        assert key in refused(capfd, "run", "step=4", "run_dir=child", override)
        assert not Path("child").exists()


# --- the record --------------------------------------------------------------------------------------------------


def test_every_resume_is_recorded(run: Path) -> None:
    start = environment(run)
    for _ in range(2):
        assert main(["resume", "run", "loop.max_steps=8"]) == 0
        (run / "summary.json").unlink()
    assert main(["resume", "run", "loop.max_steps=10", "metrics.log_every=2"]) == 0
    now = environment(run)
    history = now.pop("resumes")
    assert now == start
    assert [entry["step"] for entry in history] == [7, 8, 8]
    assert [entry["from"] for entry in history] == [f"checkpoints/step-0000000{step}" for step in (7, 8, 8)]
    changes = [["loop.max_steps", 9, 8]], [], [["metrics.log_every", 1, 2], ["loop.max_steps", 8, 10]]
    assert tuple(entry["changes"] for entry in history) == changes
    assert tuple(row["changes"] for row in events(run, "resume")) == changes
    for entry in history:
        assert entry["command"][:2] == ["llmtrain", "resume"]
        assert entry["versions"]["torch"]
        assert entry["device"].startswith("CPU")
        assert {"time", "git_commit"} <= entry.keys()


def test_a_changed_learning_rate_is_shown(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A linear decay from 0.002 to 0: at step 8, the 0-based 7th, 2/9 of the peak; with twice the steps 11/18."""
    assert main(["resume", "run", "loop.max_steps=18"]) == 0
    output = capfd.readouterr().out
    assert "    loop.max_steps  9       18\n    learning rate at step 8: 4.44e-04 -> 1.22e-03\n" in output
    assert events(run, "resume")[0]["rates"] == pytest.approx([0.002 * 2 / 9, 0.002 * 11 / 18])
    assert {row["step"]: row["learning_rate"] for row in rows(run) if "loss" in row}[8] == pytest.approx(
        0.002 * 11 / 18
    )
    assert main(["resume", "run", "loop.max_steps=19", "metrics.log_every=2"]) == 0
    assert "learning rate at step 19: 1.11e-04 -> 1.05e-04" in capfd.readouterr().out  # from the last step's
    (run / "summary.json").unlink()
    assert main(["resume", "run", "metrics.log_every=3"]) == 0
    assert "learning rate at" not in capfd.readouterr().out


# --- another optimizer -------------------------------------------------------------------------------------------


def test_another_optimizer_starts_with_a_new_state(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    overrides = ("optimizer=lion", "optimizer.lr=1e-4")
    assert main(["resume", "run", *overrides]) == 0
    assert "the saved state is AdamW's; Lion starts with a new state" in capfd.readouterr().out
    (event,) = events(run, "optimizer_reset")
    assert event["step"] == 7
    assert environment(run)["resumes"][0]["optimizer_reset"] == ["AdamW", "Lion"]
    state = read_tensors(checkpoint(run, 9) / "optimizer.safetensors")
    assert {name.rpartition("/")[2] for name in state} == {"exp_avg"}

    after = cut_back(run, 8, tmp_path / "after")  # killed after the first save: the state is Lion's
    assert main(["resume", "after"]) == 0
    assert len(events(after, "optimizer_reset")) == 1
    assert_same_end(run, after)

    before = cut_back(run, 7, tmp_path / "before")  # killed before it: what is stored already names Lion
    assert main(["resume", "before"]) == 0
    assert [row["step"] for row in events(before, "optimizer_reset")] == [7, 7]
    assert_same_end(run, before)


def test_state_that_an_option_does_not_read_is_named(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["resume", "run", "optimizer=sgd", "optimizer.momentum=0", "optimizer.nesterov=false"]) == 0
    message = refused(capfd, "run", "optimizer.momentum=0.9", "loop.max_steps=12")
    assert message.startswith("llmtrain: optimizer.momentum=0.9: needs other optimizer state than was saved")
    assert "optimizer state missing: blocks.0.attention" in message
    assert "keep optimizer.momentum=0.0" in message


# --- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.hidden_size=64", "model.hidden_size=64: this run was started with 32"),
        ("data.sequence_length=16", "cannot continue with another"),
        ("name=other", "name=other"),
        ("weights=checkpoint weights.path=run", "weights._target_"),
        ("loop.max_steps=6", "loop.max_steps=6: the run is already at step 7"),
        ("data.path=other.txt", "data: not what this run was started on"),
        ("optimizer.lr=0", "optimizer.lr"),
        ("loop.max_steps=null loop.epochs=3 accumulation.batch_size=2", "loop.epochs=null loop.max_steps=23"),
    ],
)
def test_a_refused_resume_changes_nothing(
    run: Path, capfd: pytest.CaptureFixture[str], override: str, expected: str
) -> None:
    Path("other.txt").write_text(TEXT.read_text()[:800])
    assert expected in refused(capfd, "run", *override.split(), "metrics.log_every=2")


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl", "environment.json", "config.yaml"])
def test_a_file_that_cannot_be_read_is_named_before_anything_is_written(
    run: Path, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    path = run / name
    path.write_text("{x\n" + path.read_text())
    assert f"run/{name}" in refused(capfd, "run", "optimizer.lr=1e-4")


def test_resume_with_another_batch_size_continues_data_order(run: Path) -> None:
    assert main(["resume", "run", "accumulation.batch_size=2", "accumulation.micro_batch_size=2"]) == 0
    states = [json.loads((checkpoint(run, step) / STATE).read_text())["position"] for step in (7, 8, 9)]
    assert states == [28, 30, 32]


# --- the end, the machine and the places of a run ------------------------------------------------------------------


def test_a_finished_run_whose_last_checkpoints_are_gone_trains_on(
    whole: Path, run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(whole / "summary.json", run)  # it reached step 9, and the checkpoints after step 7 were removed
    assert main(["resume", "run"]) == 0
    assert "finished already" not in capfd.readouterr().out
    assert_same_end(whole, run)
    assert main(["resume", "run"]) == 0
    for end in ((), (f"loop.max_steps={STEPS}",), ("loop.epochs=null", f"loop.max_steps={STEPS}")):
        assert main(["resume", "run", *end]) == 0
        assert f"finished already, at step {STEPS}" in capfd.readouterr().out


def test_a_finished_run_has_no_steps_left_where_its_end_is_named_in_other_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("A line of text.\n" * 100)
    data = ("data=text", "data.path=text.txt", "loop.max_steps=null", "loop.epochs=0.1")
    assert main(["train", *TINY, *data, "run_dir=run"]) == 0
    steps = json.loads(Path("run/summary.json").read_text())["step"]
    before = Path("run/config.yaml").read_text()
    capfd.readouterr()
    assert main(["resume", "run", f"loop.max_steps={steps}"]) == 0
    assert capfd.readouterr().out.startswith(f"run: finished already, at step {steps}; to train on: ")
    assert Path("run/config.yaml").read_text() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"device": "CPU, a faster one, 64 threads"}, "the run used CPU, a faster one, 64 threads, this is CPU"),
        ({"versions": {"torch": "2.0.0"}}, "the run used torch 2.0.0, this is "),
        ({}, None),
    ],
)
def test_resume_on_another_machine_says_that_bits_may_differ(
    run: Path, capfd: pytest.CaptureFixture[str], change: dict[str, Any], message: str | None
) -> None:
    facts = json.loads((run / "environment.json").read_text())
    (run / "environment.json").write_text(json.dumps(facts | change))
    assert main(["resume", "run"]) == 0
    notes = [row["message"] for row in events(run, "machine")]
    assert len(notes) == (message is not None)
    if message is not None:
        assert message in notes[0]
        assert "not bit for bit" in notes[0]
        assert message in capfd.readouterr().out.replace("\n", " ")


def test_a_stored_config_decides_no_place_of_writing(run: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    (precious / ".tmp-mine").mkdir(parents=True)
    stored = stored_config.load(run / CONFIG)
    stored["data"]["cache_dir"] = stored["output_dir"] = stored["run_dir"] = str(precious)
    (run / CONFIG).write_text(yaml.safe_dump(stored))
    for folder in (run / "checkpoints").iterdir():
        forged = folder / CONFIG
        forged.write_text((run / CONFIG).read_text())
    assert main(["resume", "run", "run_dir=branch"]) == 2  # the checkpoints no longer agree with their manifests
    for folder in (run / "checkpoints").iterdir():
        forge_config(folder)
    assert main(["resume", "run"]) == 0
    (note,) = events(run, "cache")
    assert f"data.cache_dir={precious}" in note["message"]
    assert main(["resume", "run", "step=5", "loop.max_steps=6"]) == 0  # a branch without run_dir
    assert main(["verify", "run"]) == 0
    assert [path.name for path in precious.rglob("*")] == [".tmp-mine"]
    (branch,) = (tmp_path / "runs").glob("*/*")
    assert (branch / "checkpoints" / "step-00000006").is_dir()
    given = tmp_path / "given"
    assert main(["resume", "run", "loop.max_steps=10", f"data.cache_dir={given}"]) == 0  # the user decides
    assert given.is_dir()


def forge_config(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    content = (folder / CONFIG).read_bytes()
    manifest["files"][CONFIG] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    del manifest["sha256"]
    digest = hashlib.sha256(json.dumps(manifest, indent=1).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest | {"sha256": digest}, indent=1) + "\n")


def test_a_branch_is_made_beside_its_parent(run: Path, tmp_path: Path) -> None:
    day = tmp_path / "place" / "2026-01-02"
    day.mkdir(parents=True)
    shutil.move(run, day / "mine")
    assert main(["resume", str(day / "mine"), "step=5", "loop.max_steps=6"]) == 0
    assert len(list((tmp_path / "place").glob("*/*"))) == 2
    assert not (tmp_path / "runs").exists()


def test_a_run_whose_directory_is_removed_meanwhile_has_failed(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """At its end, and before a save; nothing is made again in its place."""
    for step in (STEPS, 8):
        place = Path(shutil.copytree(run, tmp_path / f"run-{step}"))
        train_step = Loop.train_step

        def gone(loop: Loop, *, place: Path = place, step: int = step, train_step: Any = train_step) -> None:
            train_step(loop)
            if loop.state.step == step:
                loop.saves.collect(wait=True)
                shutil.move(place, f"{place}-away")

        monkeypatch.setattr(Loop, "train_step", gone)
        assert main(["resume", place.name]) == 1
        monkeypatch.undo()
        monkeypatch.chdir(tmp_path)
        message = capfd.readouterr().err
        assert f"{place.name}: the run directory was removed, renamed or replaced" in message
        assert not place.exists()


# --- configs of an older version ---------------------------------------------------------------------------------


def test_keys_unknown_to_an_older_version_get_their_defaults(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    stored = stored_config.load(run / CONFIG)
    del stored["recovery"], stored["activation_checkpointing"]
    del stored["checkpoint"]["before_evaluation"], stored["data"]["cache_dir"]
    (run / CONFIG).write_text(yaml.safe_dump(stored))
    assert main(["resume", "run"]) == 0
    changes = {key: (before, after) for key, before, after in events(run, "resume")[0]["changes"]}
    assert changes == {
        "checkpoint.before_evaluation": ("not stored", True),
        "recovery._target_": ("not stored", "llmtrain.recovery.on.RecoveryOn"),
        "activation_checkpointing._target_": ("not stored", "llmtrain.activation_checkpointing.none.KeepAll"),
    }
    assert "recovery._target_" in capfd.readouterr().out
    assert stored_config.load(run / CONFIG)["checkpoint"]["before_evaluation"] is True


def test_a_key_without_one_default_is_named(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The sizes of the models disagree on it."""
    stored = stored_config.load(run / CONFIG)
    del stored["model"]["num_layers"]
    (run / CONFIG).write_text(yaml.safe_dump(stored))
    assert "model.num_layers: missing" in refused(capfd, "run")


STOPPING = """
import signal
from dataclasses import dataclass
from pathlib import Path
from llmtrain.objective.causal import Causal, CausalUnit

@dataclass(frozen=True)
class Stopping(Causal):
    def build(self, model, *others):
        return StoppingUnit(model, self.loss, self.z_loss, self.chunk_tokens)

class StoppingUnit(CausalUnit):
    def forward(self, batch):
        sent = Path("sent")
        if not self.training and Path("cut/checkpoints/step-00000004").exists() and not sent.exists():
            sent.touch()
            signal.raise_signal(signal.SIGTERM)
        return super().forward(batch)
"""


def test_resume_repeats_a_last_evaluation_that_a_signal_cut_short(tmp_path: Path) -> None:
    """The run is not finished before it."""
    (tmp_path / "stopping.py").write_text(STOPPING)
    plugin = ("plugins=[stopping]", "objective._target_=stopping.Stopping")
    settings = (*TINY[:-2], *plugin, "loop.max_steps=4", "loop.eval_every=4", "loop.eval_batches=3",
                "loop.sample_every=0")  # fmt: skip
    llmtrain("train", *settings, "run_dir=whole", cwd=tmp_path)
    llmtrain("train", *settings, "run_dir=cut", cwd=tmp_path, check=75)
    losses = {name: [r["val_loss"] for r in rows(tmp_path / name) if "val_loss" in r] for name in ("whole", "cut")}
    assert losses["cut"] == losses["whole"][:1]
    llmtrain("resume", "cut", "plugins=[stopping]", cwd=tmp_path)
    assert [r["val_loss"] for r in rows(tmp_path / "cut") if "val_loss" in r] == losses["whole"]
    summary = json.loads((tmp_path / "cut" / "summary.json").read_text())
    assert (summary["exit_reason"], summary["final_val_loss"]) == ("finished", losses["whole"][-1])


def test_a_run_whose_checkpoints_were_deleted_is_refused(tmp_path: Path) -> None:
    llmtrain("train", *TINY, "loop.max_steps=2", "run_dir=run", cwd=tmp_path)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    done = llmtrain("resume", "run", "loop.max_steps=4", cwd=tmp_path, check=2)
    assert "there is no checkpoint, though one was saved at step 2" in done.stderr
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_a_finished_run_with_a_damaged_last_checkpoint_is_finished_again(tmp_path: Path) -> None:
    llmtrain("train", *TINY, "loop.max_steps=4", "checkpoint.every_steps=2", "run_dir=run", cwd=tmp_path)
    shutil.copytree(tmp_path / "run", tmp_path / "damaged")
    (tmp_path / "damaged" / "checkpoints" / "step-00000004" / "state.json").write_text("{}")
    done = llmtrain("resume", "damaged", cwd=tmp_path)
    assert "step-00000004/state.json" in done.stdout
    assert "finished at step 4 of 4" in done.stdout
    assert_same_end(tmp_path / "run", tmp_path / "damaged")


def test_help_without_a_run_names_the_arguments(tmp_path: Path) -> None:
    shown = llmtrain("resume", "--help", cwd=tmp_path).stdout
    assert "llmtrain resume RUN_DIR --help" in shown
    assert "step=800, or run_dir=DIR" in shown
