"""The command line: errors that help, flags in any order, nothing left behind."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from llmtrain import Run
from llmtrain.base.process import MARK
from llmtrain.cli.arguments import VERBS, split
from llmtrain.cli.main import main
from llmtrain.run.directory import RunDirectory
from tests.helpers.cli import TINY, llmtrain, only_run

Failing = Callable[..., str]
QUICK = (*TINY, "loop.max_steps=2")


@pytest.fixture
def failing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Failing:
    """Run a command line that must end with status 2, one message, no traceback and nothing left in the folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> str:
        before = sorted(tmp_path.rglob("*"))
        assert main(arguments) == 2
        error = capfd.readouterr().err
        assert "Traceback" not in error
        (message,) = (line for line in error.splitlines() if not line.startswith("tokenising "))
        assert message.startswith("llmtrain: ")
        assert sorted(tmp_path.rglob("*")) == before
        return message

    return run


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "no such verb; did you mean train?"),
        (["train", "optimizer.lrr=1"], "optimizer.lrr: no such key; did you mean optimizer.lr?"),
        (["train", "optimizer.warmup_steps=1"], "did you mean schedule.warmup_steps?"),
        (["train", "checkpoint.every=5"], "did you mean checkpoint.every_steps or checkpoint.every_minutes?"),
        (["train", "optimzer=adam"], "optimzer: no such key; did you mean optimizer?"),
        (["train", "optimizer=adamm"], "optimizer=adamm: no such option; did you mean adam?"),
        (["train", "optimizer=foo"], "there are: adafactor, adam, adamw, adamw_8bit, adamw_bf16, lion, muon, sgd"),
        (["train", "optimizer.lr=abc"], "optimizer.lr='abc': must be a number, as in 0.1 or 3e-4"),
        (
            ["train", "data.path=my.txt"],
            "the chosen option of data has none, others have: data=instruction or ",
        ),
        (["train", "data=my.txt"], "to train on a file: data=text data.path=my.txt"),
        (["train", "optimizer=adamW"], "did you mean adamw?"),
        (
            ["predict", "run", "You have won"],
            "as in: llmtrain predict RUN_DIR text=",
        ),
        (["predict", "run", "text=a", "file=b"], "text='a' and file=b: give one of them, not both"),
        (["train", "experiment=spam"], "weights.path: model=auto needs a checkpoint to read; give a run"),
        (["train", "loop.max_steps=1.5"], "loop.max_steps=1.5: must be a whole number; or null"),
        (["train", "runtime.deterministic=maybe"], "runtime.deterministic='maybe': must be true or false"),
        (["train", "runtime.device=mps"], "runtime.device=mps: an Apple GPU is not supported; take cpu, or auto"),
        (["generate", "run", "prompt=a", "device=xpu:0"], "device=xpu:0: an Intel GPU is not supported"),
        (
            ["train", "runtime.device=gpu"],
            "runtime.device=gpu: must be one of auto, cpu, cuda, or cuda:1 for the second GPU; did you mean cuda?",
        ),
        (["train", "lora=lora", "lora.targets=qkv"], "must be a list, in brackets: 'lora.targets=[qkv]'"),
        (["train", "lora=lora", "lora.targets='qkv, head'"], "must be a list, in brackets: 'lora.targets=[qkv,head]'"),
        (["train", "lora=lora", "lora.targets=qkv,head"], "if it takes a list: 'lora.targets=[qkv,head]'"),
        (["train", "--max_steps", "30"], "--max_steps: no such flag; settings have no dashes: loop.max_steps=30"),
        (["train", "--max-steps=30"], "settings have no dashes: loop.max_steps=30"),
        (["generate", "--prompt", "Hello"], "settings have no dashes: prompt=Hello"),
        (["train", "+optimizer.lrr=1"], "optimizer.lrr: no such key"),
        (["train", "+nobody.reads=1"], "nobody: no such key"),
        (["train", "loop.max_steps=-5"], "loop.max_steps=-5: must be at least 1"),
        (["train", "model.hidden_size=100"], "model.hidden_size=100: must be divisible by num_heads=12"),
        (["train", "optimizer._target_=os.system"], "not a class of llmtrain"),
        (
            ["train", "optimizer._target_=llmtrain.config.compose.load"],
            "not a dataclass defined in llmtrain.config.compose",
        ),
        (["train", "weights=checkpoint"], "weights.path: a value is required"),
        (["train", "weights=checkpoint", "weights.path=nowhere", *QUICK], "nowhere: no such directory"),
        (
            ["train", "model=auto", "weights=checkpoint", "weights.path=runs/base"],
            "llmtrain: weights.path=runs/base: no such direc",
        ),
        (["train", "model=auto", "weights=checkpoint", "weights.path=."], "weights.path=.: it has no config.yaml"),
        (
            ["train", "model=auto", "weights=huggingface", "weights.path=gpt2"],
            " weights.path=gpt2: no such directory in /",
        ),
        (
            ["train", "model=tiny", "data.sequence_length=4096"],
            "data.sequence_length=64, or a longer model.context_length",
        ),
        (["train", "model.vocab_size=10", *QUICK], "model.vocab_size=10: tokenizer=byte has 257 ids"),
        (["train", "schedule.min_lr=1"], "schedule.min_lr=1.0: above the peak"),
        (
            ["train", "optimizer.rules=[{pattern:nothing,lr_multiplier:2}]", *QUICK],
            "optimizer.rules[0].pattern='nothing'",
        ),
        (["train", "loop.max_steps=["], "loop.max_steps='[': must be a whole number; or null"),
        (["train", "--multirum"], "--multirum: no such flag; did you mean --multirun?"),
        (["train", "--experimental-rerun=x.pkl"], "not supported; it would unpickle"),
        (["train", "stray"], "stray: neither key=value nor group=option nor a flag"),
        (["train", "--config-dir"], "--config-dir: needs a value"),
        (["train", "--config-dir", "nowhere"], "nowhere"),
        (["train", "--package", "clipping"], "--package: only with --cfg job"),
        (["generate", ".", "hello"], 'hello: not key=value; for a prompt: prompt="hello"'),
        (["generate", "hello", "you", "."], 'hello you: not key=value; for a prompt: prompt="hello you"'),
        (["generate", "run", "US$ 5"], "US$ 5: not key=value; for a prompt: prompt='US$ 5'"),
        (["verify", ".", "hello"], "hello: neither key=value nor a directory that this verb takes"),
        (["resume", "--cfg", "job"], "resume shows the stored config of a run; name it"),
        (["resume"], "resume takes one directory"),
        (["resume", "nowhere"], "nowhere: no such run directory"),
        (["resume", "."], "not a run directory (it has no config.yaml)"),
        (["resume", "-m", "."], "resume continues one run"),
        (["generate", "nowhere"], "nowhere: no such directory"),
        (["generate", "nowhere", "temperature=-1"], "temperature=-1.0: must be 0 (greedy) or more"),
        (["generate", "nowhere", "max_token=5"], "max_token: no such key; did you mean max_tokens?"),
        (["report", "nowhere"], "nowhere"),
        (["report"], "report takes directories"),
    ],
)
def test_mistakes_are_named_with_what_would_work(failing: Failing, arguments: list[str], message: str) -> None:
    assert message in failing(*arguments)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "data.path=text.txt: no such file or folder in /"),
        (b"", "text.txt"),
        (b"PK\x03\x04\x00\x00\x00binary", "binary"),
        (b"caf\xe9 au lait " * 100, "text.txt: byte 3"),
        (b"short", "make no sequence"),
    ],
)
def test_unusable_text_is_refused(failing: Failing, tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "text.txt").write_bytes(content)
    assert message in failing("train", *QUICK, "data=text", "data.path=text.txt")


def test_shards_with_ids_beyond_the_vocabulary_are_refused(failing: Failing, tmp_path: Path) -> None:
    (tmp_path / "train.bin").write_bytes(b"\x01\x00\xff\xff" * 500)
    message = failing("train", *QUICK, "data=shards", "data.path=train.bin")
    assert "train.bin: token 1 is 65535" in message


def test_a_run_locked_by_another_process_is_refused(failing: Failing, tmp_path: Path) -> None:
    run = Run.compose(*QUICK, f"run_dir={tmp_path / 'run'}").train().run_dir
    with RunDirectory(run).lock():
        assert "is working in this run" in failing("resume", str(run), "loop.max_steps=5")


def test_a_corrupt_checkpoint_is_refused_by_every_verb(failing: Failing, tmp_path: Path) -> None:
    run = Run.compose(*QUICK, f"run_dir={tmp_path / 'run'}").train().run_dir
    weights = run / "checkpoints" / "step-00000002" / "model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    for arguments in (["resume", str(run), "loop.max_steps=5"], ["generate", str(run)]):
        assert f"{weights}: its sha256 is not the manifest's" in failing(*arguments)


def test_resume_refuses_data_that_changed(failing: Failing, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Some words to train on. " * 50)
    run = Run.compose(*QUICK, "data=text", f"data.path={text}", f"run_dir={tmp_path / 'run'}").train().run_dir
    text.write_text("Other words to train on. " * 50)
    assert "data: not what this run was started on" in failing("resume", str(run), "loop.max_steps=5")


def test_a_run_without_space_for_its_checkpoints_is_refused(failing: Failing, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    real = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real(path)._replace(free=10_000))
    assert "free, the checkpoints of this run need" in failing("train", *QUICK)


def test_an_existing_run_dir_is_refused(failing: Failing, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    assert "run_dir=there: exists already" in failing("train", *QUICK, "run_dir=there")


def test_a_disk_that_fills_up_ends_the_run_with_a_message(tmp_path: Path) -> None:
    """The run fails with a message; what was saved before is whole, and resume goes on once there is room."""
    arguments = (*TINY, "loop.max_steps=4", "run_dir=run", "checkpoint.every_steps=2")
    env = {"LLMTRAIN_CACHE": str(tmp_path / "cache")}
    llmtrain("train", *TINY, "loop.max_steps=1", cwd=tmp_path, env=env)  # the data cache is made without the limit
    done = llmtrain("train", *arguments, cwd=tmp_path, env=env, file_bytes=150_000, check=1)
    assert "the checkpoint could not be written" in done.stderr
    assert "llmtrain resume run" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "run" / "checkpoints").iterdir())
    llmtrain("resume", "run", cwd=tmp_path, env=env)
    assert (tmp_path / "run" / "checkpoints" / "step-00000004" / "manifest.json").is_file()


def test_not_finite_three_times_ends_the_run(tmp_path: Path) -> None:
    done = llmtrain("train", *TINY, "loop.max_steps=9", "optimizer.lr=1e30", "schedule=constant", "precision=fp32",
                    "clipping=none", "recovery=off", "run_dir=run", cwd=tmp_path, check=1)  # fmt: skip
    assert "3rd step in a row that is not finite" in done.stderr
    assert "optimizer.lr" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_key_that_the_chosen_option_lacks_is_refused(tmp_path: Path) -> None:
    done = llmtrain("plan", *TINY, "clipping=none", "clipping.max_norm=1", cwd=tmp_path, check=2)
    assert "clipping.max_norm: no such key; the chosen option of clipping has none" in done.stderr


def test_a_run_whose_last_steps_were_all_refused_has_failed(tmp_path: Path) -> None:
    done = llmtrain("train", *TINY, "loop.max_steps=9", "optimizer.lr=1e30", "schedule=constant", "precision=fp32",
                    "clipping=none", "run_dir=run", cwd=tmp_path, check=1)  # fmt: skip
    assert "none of its last 8 steps updated the weights" in done.stderr
    assert "Traceback" not in done.stderr


def test_secrets_stay_out_of_the_run_directory(tmp_path: Path) -> None:
    plugin = tmp_path / "mine.py"
    plugin.write_text(
        "from dataclasses import dataclass\n"
        "from llmtrain.metrics.local import Local\n"
        "@dataclass(frozen=True)\n"
        "class Keyed(Local):\n"
        "    api_key: str\n"
    )
    arguments = ("plugins=[mine]", "metrics._target_=mine.Keyed", "+metrics.api_key=${oc.env:SOME_KEY}")
    llmtrain("train", *QUICK, *arguments, "run_dir=run", cwd=tmp_path, env={"SOME_KEY": "hush-hush"})
    resumed = llmtrain("resume", "run", "loop.max_steps=3", "plugins=[mine]", cwd=tmp_path, check=2)
    assert "metrics.api_key: it is a secret and was not stored" in resumed.stderr
    llmtrain("resume", "run", "loop.max_steps=3", "plugins=[mine]", "metrics.api_key=hush-hush", cwd=tmp_path)
    assert "metrics.api_key" not in (tmp_path / "run" / "metrics.jsonl").read_text()  # given again, not changed
    for path in (tmp_path / "run").rglob("*"):
        assert not path.is_file() or b"hush-hush" not in path.read_bytes(), path


def test_plugins_of_a_stored_run_must_be_named_again(tmp_path: Path) -> None:
    """A run directory that came from elsewhere cannot name code to run."""
    (tmp_path / "mine.py").write_text(
        "from dataclasses import dataclass\n"
        "from llmtrain.schedule import Schedule\n"
        "@dataclass(frozen=True)\n"
        "class Flat(Schedule):\n"
        "    share: float\n"
        "    def __call__(self, step, *, peak, total):\n"
        "        return self.share * peak\n"
    )
    conf = tmp_path / "conf" / "schedule"
    conf.mkdir(parents=True)
    (conf / "flat.yaml").write_text("_target_: mine.Flat\nshare: 0.5  # of optimizer.lr\n")
    llmtrain("train", *QUICK, "schedule=flat", "--config-dir", "conf", "plugins=[mine]", "run_dir=run", cwd=tmp_path)
    refused = llmtrain("resume", "run", "loop.max_steps=3", cwd=tmp_path, check=2)
    assert "plugins=[mine]" in refused.stderr
    llmtrain("resume", "run", "loop.max_steps=3", "plugins=[mine]", cwd=tmp_path)


def test_a_model_of_a_plugin_trains(tmp_path: Path) -> None:
    model = tmp_path / "conf" / "model"
    model.mkdir(parents=True)
    (model / "mine.yaml").write_text("defaults:\n  - tiny\nnum_layers: 1\n")
    quick = [override for override in QUICK if not override.startswith("model=")]
    done = llmtrain("train", "model=mine", *quick, "--config-dir", "conf", cwd=tmp_path)
    assert "mine" in done.stdout
    assert only_run(tmp_path / "runs").name.startswith("mine-")
    assert "mine" in llmtrain("train", "--config-dir=conf", "--help", cwd=tmp_path).stdout


def test_flags_may_come_in_any_order(tmp_path: Path) -> None:
    orders = (
        ["train", "model=tiny", "--cfg", "job", "loop.max_steps=3"],
        ["train", "--cfg=job", "model=tiny", "loop.max_steps=3"],
        ["train", "model=tiny", "loop.max_steps=3", "-c", "job"],
    )
    outputs = {llmtrain(*order, cwd=tmp_path).stdout for order in orders}
    assert len(outputs) == 1
    assert "max_steps: 3" in outputs.pop()
    assert not list(tmp_path.iterdir())


def test_arguments_are_split_into_flags_paths_and_overrides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=b").mkdir()
    assert split("report", ["x", "plot=false", "-c", "job", "a=b"]) == (
        ["--cfg=job"], [Path("x"), Path("a=b")], ["plot=false"],
    )  # fmt: skip
    assert split("train", ["--info", "searchpath", "-m", "a=1"])[0] == ["--info=searchpath", "-m"]
    assert split("train", ["--info", "a=1"]) == (["--info=all"], [], ["a=1"])


def test_completion_offers_groups_options_and_keys(tmp_path: Path) -> None:
    def complete(line: str) -> list[str]:
        env = {"COMP_LINE": line, "COMP_POINT": str(len(line))}
        return llmtrain("-sc", "query=bash", cwd=tmp_path, env=env).stdout.split()

    assert complete("llmtrain ") == list(VERBS)
    assert complete("llmtrain re") == ["resume", "report"]
    assert "optimizer=adamw" in complete("llmtrain train optimizer=a")
    assert "optimizer=lion" in complete("llmtrain plan model=tiny optimizer=")
    assert "optimizer.lr=" in " ".join(complete("llmtrain train optimizer.l"))
    assert "complete" in llmtrain("-sc", "install=bash", cwd=tmp_path).stdout


def test_help_and_version_need_no_verb(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--help"], ["-h"]):
        assert main(arguments) == 0
        assert "llmtrain VERB" in capsys.readouterr().out
    assert main(["--version"]) == 0


def test_help_of_a_verb_lists_its_keys(tmp_path: Path) -> None:
    predict = llmtrain("predict", "--help", cwd=tmp_path).stdout
    assert predict.startswith("llmtrain predict RUN_DIR [key=value]\n")
    assert re.search(r"^  threshold=0\.5 +of runs with several labels a text: the least", predict, re.MULTILINE)
    assert "groups" not in predict
    for verb in VERBS.keys() - {"resume", "predict"}:
        assert llmtrain(verb, "-h", cwd=tmp_path).stdout.startswith(f"llmtrain {verb}")
    assert list(tmp_path.iterdir()) == []


def test_help_follows_the_overrides(tmp_path: Path) -> None:
    alone = llmtrain("train", "optimizer=muon", "model=tiny", "-h", cwd=tmp_path).stdout
    assert "Muon for the matrices of the blocks" in alone
    assert re.search(r"^  model\.num_layers=2 +blocks", alone, re.MULTILINE)
    assert "schedule=" not in alone
    shown = llmtrain("train", "experiment=spam", "optimizer=muon", "weights.path=x", "--help", cwd=tmp_path).stdout
    assert "Spam classification" in shown  # what the recipe is
    assert re.search(r"^  optimizer +muon  adafactor adam ", shown, re.MULTILINE)  # the chosen option first
    assert re.search(r"^  optimizer\.ns_steps=5 +Newton-Schulz", shown, re.MULTILINE)
    assert re.search(r"^  optimizer\.lr=5e-05 +peak learning rate", shown, re.MULTILINE)  # the recipe's
    assert "lora.also_train=[]" in shown
    assert "the layer that an objective adds" in " ".join(shown.split())  # a comment's second line


def test_help_of_resume_shows_the_values_of_the_run(tmp_path: Path) -> None:
    run = Run.compose(*QUICK, "optimizer.lr=0.004", f"run_dir={tmp_path / 'run'}").train().run_dir
    shown = llmtrain("resume", str(run), "--help", cwd=tmp_path).stdout
    assert re.search(r"^  optimizer\.lr=0\.004 +peak learning rate", shown, re.MULTILINE)


def test_the_spam_recipe_finds_its_data_from_any_folder(tmp_path: Path) -> None:
    """``experiment=spam`` from a folder that has nothing but a base, whose tokenizer it takes."""
    llmtrain("train", *QUICK, "run_dir=base", cwd=tmp_path)
    done = llmtrain(
        "train", "experiment=spam", "weights=checkpoint", "weights.path=base", "lora=none",
        "data.sequence_length=64", "loop.epochs=null", "loop.max_steps=2", "loop.eval_every=0", "run_dir=spam",
        cwd=tmp_path,
    )  # fmt: skip
    assert "messages.csv, 1,600 texts" in done.stdout
    assert "llmtrain predict spam" in done.stdout
    refused = llmtrain("generate", "spam", cwd=tmp_path, check=2).stderr
    assert "spam: this run was trained to classify texts" in refused
    assert "base: this run was not trained to classify texts" in llmtrain(
        "predict", "base", "text=x", cwd=tmp_path, check=2
    ).stderr  # fmt: skip


def test_the_system_allocator_is_stored_and_resumed(tmp_path: Path) -> None:
    llmtrain("train", *QUICK, "runtime.allocator=system", "run_dir=run", cwd=tmp_path)
    assert "allocator: system" in (tmp_path / "run" / "config.yaml").read_text()
    llmtrain("resume", "run", "loop.max_steps=3", cwd=tmp_path)
    refused = llmtrain("train", *QUICK, "runtime.allocator=jemalloc", cwd=tmp_path, check=2).stderr
    assert "runtime.allocator='jemalloc': must be one of auto, tuned, system" in refused


def test_the_system_allocator_from_a_file_is_refused_where_malloc_is_tuned_already(tmp_path: Path) -> None:
    conf = tmp_path / "conf" / "runtime"
    conf.mkdir(parents=True)
    (conf / "plain.yaml").write_text("defaults:\n  - default\nallocator: system\n")
    arguments = ("train", *QUICK, "--config-dir", "conf", "runtime=plain")
    refused = llmtrain(*arguments, cwd=tmp_path, env={MARK: "1"}, check=2).stderr
    assert "runtime.allocator=system: comes from a file" in refused
    llmtrain(*arguments, cwd=tmp_path)
