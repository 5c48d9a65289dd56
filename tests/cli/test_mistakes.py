"""Words that cannot be meant as they stand, and what was meant instead; nothing given is dropped in silence."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmtrain import Run
from llmtrain.cli.main import main
from llmtrain.config.compose import compose
from llmtrain.lint.case import Case
from llmtrain.lint.unread import between_groups
from llmtrain.report.runs import RunSummary
from llmtrain.report.table import Comparison
from llmtrain.run.origin import run_at
from llmtrain.sweep.jobs import Job
from tests.helpers.cli import TINY, llmtrain

QUICK = (*TINY, "loop.max_steps=1", "checkpoint.every_steps=0", "data.sequence_length=8")
Failing = Callable[..., str]


@pytest.fixture
def failing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Failing:
    """Run a command line that must end with status 2 and a message, and leave nothing, in the cache neither."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLMTRAIN_CACHE", str(tmp_path / "cache"))

    def run(*arguments: str) -> str:
        before = sorted(tmp_path.rglob("*"))
        assert main(arguments) == 2
        error = capfd.readouterr().err
        assert "Traceback" not in error
        assert sorted(tmp_path.rglob("*")) == before
        return error

    return run


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "optimizer.lr", "1e-3"], "optimizer.lr 1e-3: = is missing; optimizer.lr=1e-3"),
        (["train", "optimizer", "lion"], "optimizer lion: = is missing; optimizer=lion"),
        (["train", "loop.max_steps", "=", "5"], "there is no space around =; loop.max_steps=5"),
        (["train", "loop.max_steps=", "5"], "there is no space around =; loop.max_steps=5"),
        (["train", "loop.max_steps", "=5"], "there is no space around =; loop.max_steps=5"),
        (["train", "dtype=bf16"], "dtype: no such key; did you mean precision=bf16?"),
        (["train", "lr=1e-3"], "lr: no such key; did you mean optimizer.lr=1e-3?"),
        (["train", "batch_size=8"], "did you mean accumulation.batch_size=8?"),
        (["train", "epochs=3"], "did you mean loop.epochs=3?"),
        (["train", "learning_rate=1"], "did you mean optimizer.lr=1?"),
        (["train", "--lr", "1e-3"], "--lr: no such flag; settings have no dashes: optimizer.lr=1e-3"),
        (["train", "--num-train-epochs=3"], "settings have no dashes: loop.epochs=3"),
        (["train", "--model", "tiny"], "settings have no dashes: model=tiny"),
        (["train", "--bf16"], "settings have no dashes: precision=bf16"),
        (["train", "gpt124m"], "gpt124m: an option of a group; model=gpt124m"),
        (["train", "laptop"], "experiment=laptop or model=laptop"),
        (["train", "text (1).txt"], "to train on it: data=text data.path='text (1).txt'"),
        (["train", "data=corpus/stories.txt"], "to train on a file: data=text data.path=corpus/stories.txt"),
        (["train", "data=text (1).txt"], "to train on a file: data=text data.path='text (1).txt'"),
        (["train", "model=some/dir"], "model=auto weights=huggingface weights.path=some/dir"),
        (["train", "tokenizer=some/dir"], "tokenizer=huggingface tokenizer.path=some/dir"),
        (["export", "run", "my-model"], "for the directory to write: to=my-model"),
        (["export", "run", "to", "my-model"], "to my-model: = is missing; to=my-model"),
        (["export", "run", "formt=x", "to=x"], "formt: no such key; did you mean format?"),
        (["generate", "run", "temperature", "0.5"], "temperature 0.5: = is missing; temperature=0.5"),
        (["train", ""], "argument 2 is '', no word"),
        (["train", "\t"], "no word"),
        (["train", "="], "=: has no key"),
        (["train", "=5"], "=5: has no key"),
        (["train", "--"], "--: not needed"),
        (["-m"], "-m: no such verb"),
        (["-sc"], '-sc: as in: eval "$(llmtrain -sc install=bash)"'),
        (["-sc", "query=csh"], "-sc: as in"),
        (["train", "-sc"], "-sc: no such flag"),
        (["train", "caf\udce9=1"], "argument 2 is not UTF-8"),
        (["train", "data.path=caf\udce9.txt"], "rename the file, or name one that links to it"),
        (["train", "name=\udcff"], "argument 2 is not UTF-8"),
        (["train", "hydra.verbose=§"], "hydra.verbose=§: cannot be read; a text with such characters is written in"),
        (["train", "hydra.launcher.x=['"], "hydra.launcher.x=[': cannot be read; a text with such characters"),
        (["train", "a:b=3"], "a:b=3: 'a:b' is no key; key=value, as in optimizer.lr=1e-3"),
        (["train", "name=a\x1b[31m", "bogus=\x07"], "bogus: no such key"),
        (["train", "x" * 100_000], "x…x"),
        (["train", "ü=1"], "'ü' is no key"),
        (["train", "[x=1"], "'[x' is no key"),
        (["train", "optimizer=[adamw,lion]"], "a run of each is a sweep: -m optimizer=adamw,lion"),
        (["train", "optimizer=adamw,lion"], "a run of each is a sweep: -m optimizer=adamw,lion"),
        (["train", "metrics=[local,tensorboard]"], "metrics=tensorboard writes metrics.jsonl as well"),
        (["train", "experiment=[laptop,spam]"], "a run has one option of this group"),
        (["train", "model=[[a]]"], "model=[[a]]: takes the name of an option, not a list"),
        (["train", "model=[]"], "model=[]: takes the name of an option, not a list"),
        (["train", "--config-dir", "a", "--config-dir", "b"], "--config-dir=a is given too; name one"),
        (["train", "--config-name=plan"], "--config-name: no such flag"),
        (["train", "--info=x"], "--info=x: must be one of all, config"),
        (["train", "--cfg=x"], "--cfg=x: must be one of job, hydra, all"),
        (["train", "hydra.run.dir=out"], "run_dir=DIR names the directory of a run"),
        (["train", "+hydra.output_subdir=out"], "this setting of Hydra's cannot be changed"),
        (["train", "hydra.mode=MULTIRUN"], "-m runs a sweep"),
        (["train", "hydra/job_logging=default"], "this setting of Hydra's cannot be changed"),
        (["train", "~nothing"], "~nothing: no such key"),
        (["train", "+optimizer=adamw"], "the group has an option already"),
        (["train", "name=${nothing}"], "if it is no reference but the text itself: "),
        (["train", "optimizer.betas=[0.9"], "a bracket or a quote in it is not closed"),
        (["train", "loop.max_steps=1e3", "loop.max_tokens=1e6"], "give one, loop.max_steps=null"),
        (["generate", "run", "plugins=inf"], "must be a list, in brackets: 'plugins=[inf]'"),
        (["train", "--from", "nowhere"], "nowhere: no such run directory"),
        (["report", "--from", "x"], "only for a new run, as in: llmtrain train --from"),
        (["train", "lora=true"], "lora=true: no such option; did you mean lora? there are: dora, lora, none, rslora"),
        (["train", "lora=8"], "lora=8: no such option; did you mean lora? there are: dora, lora, none, rslora"),
        (["train", "lora=dorra"], "lora=dorra: no such option; did you mean dora?"),
        (["train", "recovery=nothing"], "recovery=nothing: no such option; there are: off, on"),
        (["train", "lora=false"], "lora=false: no such option; did you mean none?"),
        (["train", "recovery=true"], "recovery=true: no such option; did you mean on?"),
        (["train", "precision=1"], "precision=1: no such option; there are: auto, bf16"),
        (["train", "-m", "precision=1,fp32"], "precision=1: no such option"),
        (["train", "gradient_accumulation_steps=2"], "accumulation.micro_batch_size how many of them go through at"),
        (["train", "--gradient-accumulation-steps", "2"], "accumulation.batch_size is the number of sequences"),
        (["train", "grad_accum", "2"], "grad_accum 2: = is missing, and there is no such key; accumulation.batch_size"),
        (["train", "block_size=32"], "data.sequence_length=32 for the sequences that are trained on; model.context_le"),
        (["train", "fp16=true"], "fp16: no such key; did you mean precision=fp16?"),
        (["train", "bf16=True"], "did you mean precision=bf16?"),
        (["train", "+tf32=true"], "did you mean precision=tf32?"),
        (["train", "fp32=false"], "it is an option of precision: choose another, as in precision=auto"),
        (["train", "wandb=true"], "wandb: no such key; metrics=tensorboard writes curves"),
        (["train", "config=my.yaml"], "--config-dir DIR experiment=NAME reads DIR/experiment/NAME.yaml"),
        (["train", "--config", "my.yaml"], "--config: no such flag; a recipe of yours lies in a folder: --config-dir"),
        (["train", "my.yaml"], "my.yaml: neither key=value nor a flag; a recipe of yours lies in a folder"),
        (["train", "experiment=my.yaml"], "no such option; a recipe of yours lies in a folder"),
        (["train", "+foo=1"], "foo: no such key; there are: "),
        (["generate", "r", "--prompt", "Once upon a time"], "settings have no dashes: 'prompt=Once upon a time'"),
        (["generate", "r", "prompt=hi", "file=nope.txt"], "prompt='hi' and file=nope.txt: give one of them, not both"),
        (["generate", "r", "file=nope.txt"], "file=nope.txt: no such file in"),
        (["predict", "r", "file=nope.csv"], "file=nope.csv: no such file or folder in"),
        (["predict", "r", "nope.csv"], "for a file of texts: file=nope.csv, as in: llmtrain predict RUN_DIR file=nop"),
        (["predict", "r", "I like it."], 'for a text: text="I like it."'),
        (["export", "r"], "to: name the directory to write, as in: llmtrain export RUN to=my-model"),
        (["train", "data=text"], "data.path: a value is required: a file or a folder, as in data.path=my-text"),
        (["train", *QUICK, "output_dir=text (1).txt/x"], "text (1).txt is not a directory; name another place"),
        (["train", *QUICK, "run_dir=" + "x" * 300], "longer than 255 bytes"),
    ],
)
def test_a_mistake_is_answered_with_what_was_meant(
    failing: Failing, tmp_path: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "text (1).txt").write_text("some text")
    shown = failing(*arguments)
    assert message in shown or ("…" in message and "…" in shown)
    assert len(shown) < 3000
    assert "\x1b" not in shown


@pytest.mark.parametrize(
    "mistake",
    [
        ("optimizer.rules=[{pattern:nothing,lr_multiplier:2}]",),
        ("schedule=constant", "optimizer.lr=0"),
        ("run_dir=there",),
    ],
)
def test_a_refused_run_leaves_no_cache(failing: Failing, tmp_path: Path, mistake: tuple[str, ...]) -> None:
    (tmp_path / "there").mkdir()
    failing("train", *QUICK, *mistake)
    assert not (tmp_path / "cache").exists()


def test_a_recipe_of_ones_own_is_read_from_a_folder(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nloop: {max_steps: 3}\n")
    assert compose("train", ["experiment=mine"], tmp_path)["loop"]["max_steps"] == 3


def test_a_sweep_of_nothing_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    job = Job.check(compose("train", QUICK), [])
    assert main(["train", *QUICK, f"run_dir={job.directory(Path('sweep'), []).path}"]) == 0
    assert main(["train", "-m", *QUICK, "hydra.sweep.dir=sweep"]) == 0  # the job is finished already
    assert "nothing varies, so there is one job; to vary a key: optimizer.lr=1e-3,1e-4" in capfd.readouterr().out


def test_a_key_that_is_given_twice_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    given = ("model=tiny", "optimizer=adamw", "optimizer=lion", "optimizer.lr=1", "++optimizer.lr=0.5", "model=tiny")
    assert main(["train", *given, "--cfg", "job"]) == 0
    shown = capfd.readouterr()
    assert "optimizer=adamw and optimizer=lion: the same key; the last one counts" in shown.err
    assert "optimizer.lr=1 and ++optimizer.lr=0.5: the same key; the last one counts" in shown.err
    assert "model=tiny" not in shown.err  # the same twice
    composed = yaml.safe_load(shown.out)
    assert composed["optimizer"]["lr"] == 0.5
    assert composed["optimizer"]["_target_"].endswith("Lion")


def test_a_part_to_train_beside_adapters_is_reported() -> None:
    run = Run.compose("model=tiny", "data=labelled", "data.path=x", "objective=classification", "lora=lora",
                      "weights=checkpoint", "weights.path=x", "data.sequence_length=8")  # fmt: skip
    parts: Any = (None, None, None)  # which this rule does not read
    reasons = between_groups(Case(run, *parts, 1))
    assert reasons["objective.train"] == "with lora=lora its adapters and the head are trained; lora=none"


def test_whole_numbers_may_be_written_as_others() -> None:
    assert Run.compose("loop.max_steps=1e3").loop.max_steps == 1000
    assert Run.compose("loop.sample_tokens=5.0").loop.sample_tokens == 5
    with pytest.raises(ValueError, match=r"loop.max_steps=1.5: must be a whole number"):
        Run.compose("loop.max_steps=1.5")


@pytest.mark.parametrize("overrides", [["optimizer=adamm"], ["optimizer.lrr=1"], ["loop.max_steps=["], ["name=${x}"],
                                       ["optimizer.lr=1,2"], ["~nothing"], ["a b=1"], ["optimizer=[a,b]"]])  # fmt: skip
def test_compose_raises_value_error(overrides: list[str]) -> None:
    with pytest.raises(ValueError, match=r"."):
        Run.compose(*overrides)


def test_a_length_in_tokens_takes_the_place_of_the_default() -> None:
    run = Run.compose("loop.max_tokens=1e4", "data.sequence_length=64", "accumulation.batch_size=4")
    assert (run.loop.max_steps, run.loop.epochs, run.loop.max_tokens) == (None, None, 10_000)
    assert compose("train", ["loop.max_tokens=null"])["loop"]["max_steps"] == 1000
    with pytest.raises(ValueError, match=r"max_tokens=10: epochs=2.0 is a length of the run, too"):
        Run.compose("loop.max_tokens=10", "loop.epochs=2")


def test_a_run_of_a_length_in_tokens_trains_on_so_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    length = [override for override in QUICK if not override.startswith("loop.max_steps")]
    result = Run.compose(*length, "loop.max_tokens=100", f"run_dir={tmp_path / 'run'}").train()
    assert "step-00000004" in {path.name for path in (result.run_dir / "checkpoints").iterdir()}  # of 32 tokens
    monkeypatch.chdir(tmp_path)
    assert main(["resume", "run", "loop.max_tokens=160"]) == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["step"] == 5


@pytest.mark.slow
def test_a_sweep_ends_with_the_command_that_trains_its_best_job_longer(tmp_path: Path) -> None:
    (tmp_path / "llmtrain").mkdir()  # as in the folder above a clone
    sweep = ("train", "-m", *QUICK, "loop.eval_every=1", "optimizer.lr=1e-4,1e-2", "hydra.sweep.dir=my (sweep)")
    shown = llmtrain(*sweep, cwd=tmp_path).stdout
    table = shown[shown.rindex("──") :]
    assert all(len(line) <= 130 for line in table.splitlines() if "llmtrain" not in line)
    assert "0.0001" in table
    line = next(line for line in table.splitlines() if "for longer" in line)
    best = run_at(tmp_path / "my (sweep)")
    assert line == f"the best job for longer: llmtrain train --from 'my (sweep)/{best.name}' loop.max_steps=2"
    composed = llmtrain("train", "--from", "my (sweep)", "loop.max_steps=2", "--cfg", "job", cwd=tmp_path).stdout
    lr = yaml.safe_load((best / "config.yaml").read_text())["optimizer"]["lr"]
    assert yaml.safe_load(composed)["optimizer"]["lr"] == lr
    assert yaml.safe_load(composed)["loop"]["max_steps"] == 2


def test_a_sweep_shows_the_values_that_it_varied() -> None:
    def run(name: str) -> RunSummary:
        return RunSummary(Path(name), "x", "finished", 1, 1, 10, None, None, 2.0, 1.0, 1, {"optimizer.lr": name})

    swept = {Path(f"optimizer.lr_{lr}-0a1b2c3{lr}"): {"optimizer.lr": str(lr), "optimizer": "lion"} for lr in (1, 2)}
    table = Comparison([run(str(path)) for path in swept], swept)
    assert table.settings() == {"lr": ["1", "2"], "optimizer": ["lion", "lion"]}
    assert [table.run_name(summary) for summary in table.runs] == ["0a1b2c31", "0a1b2c32"]


def test_a_folder_named_llmtrain_does_not_hide_the_program(tmp_path: Path) -> None:
    """Jobs of a sweep are started with ``-P``, so that the folder of a clone is not taken for the package."""
    (tmp_path / "llmtrain").mkdir()
    done = subprocess.run(
        [sys.executable, "-P", "-m", "llmtrain", "--version"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout.startswith("llmtrain ")
