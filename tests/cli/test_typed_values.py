"""Whatever is typed or owned is data: names, paths and prompts with characters that mean something to Hydra."""

from pathlib import Path
from typing import get_type_hints

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from llmtrain import Run
from llmtrain.cli.main import main
from llmtrain.config.compose import compose
from llmtrain.config.folders import conf_dir
from llmtrain.config.key_types import fields, target_of
from llmtrain.config.stored_config import ConfigError
from llmtrain.config.texts import as_typed
from tests.helpers.cli import TINY

QUICK = (*TINY, "loop.max_steps=1", "checkpoint.every_steps=0", "data.sequence_length=8")
NAMES = (
    "a [1].txt", "a (1).txt", "[draft].txt", "x=1.txt", "#1.txt", "~old.txt", "it's.txt", '"quoted".txt', "a,b.txt",
    "${HOME}.txt", "ünï.txt", "数据.txt", "two words.txt", " begins with a space.txt", "ends with a backslash\\",
    "c:\\x.txt", "a*b?.txt", "{a}.txt", "100%.txt", "a&b;c|d.txt", "-dash.txt", "a\tb.txt", "a@b.txt", "+x.txt",
    "null.txt", "null", "true", "007", "1e3", "1_000", "[a,b]", "{a: 1}", "choice(a,b)", "'a' and 'b'", "'", "\\'",
    "$(x).txt", "`x`.txt", "!a.txt", "🦙.txt", "a${oc.env:HOME}b", "${data.path}",
)  # fmt: skip
PROMPTS = (
    '"Hello," she said.', "'Twas the night", 'say "hi"', "it's, well, (odd)", "${oc.env:HOME}", "a ${b",
    "[INST] x [/INST]", "{a}", "x = y", "# title", "~", "null", "true", "1e-3", "a,b", "glob(*)", "Größe 数据 🦙",
    "back\\slash\\", "\\'", "a\nb", " space ", "", ":", "<|endoftext|>", "\\${x}", "'a', 'b'", "$x",
    "\\\\${oc.env:HOME}", "don't; 'do'",
)  # fmt: skip


def read_by_hydra(verb: str, override: str) -> object:
    """The value that Hydra and OmegaConf make of an override."""
    (typed,) = as_typed(verb, [override])
    return OmegaConf.create({"x": OverridesParser.create().parse_override(typed).value()}).x


@pytest.mark.parametrize("name", NAMES)
def test_a_text_of_any_name_is_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text("Some words to train on. " * 9)
    assert read_by_hydra("train", f"data.path={name}") == name


@pytest.mark.parametrize("name", [name for name in NAMES if "${" not in name])
def test_a_name_that_no_file_has_yet_is_taken_as_typed(name: str) -> None:
    if name != "null":
        assert read_by_hydra("train", f"run_dir={name}") == name
    assert read_by_hydra("train", f"output_dir={name}") == name


@pytest.mark.parametrize("pattern", ["six/[e-f]*", "'six/[e-f]*'", "six/[!a]*", "six/?.txt", "**/[ab]*.txt"])
def test_a_pattern_of_files_is_taken_as_typed(pattern: str) -> None:
    assert read_by_hydra("train", f"data.path={pattern}") == pattern.strip("'")


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_prompt_is_taken_as_typed(prompt: str) -> None:
    assert read_by_hydra("generate", f"prompt={prompt}") == prompt
    assert read_by_hydra("train", f"loop.sample_prompt={prompt}") == prompt


def test_many_texts_pass_through_a_whole_composition() -> None:
    columns = ("instruction", "input", "output", "prompt", "completion")
    for some in (PROMPTS[part : part + 5] for part in range(0, len(PROMPTS), 5)):
        given = [
            f"data.{column}_column={text}" for column, text in zip(columns, some, strict=False) if "${" not in text
        ]
        prompt = f"loop.sample_prompt={some[0]}"
        run = Run.compose("data=instruction", "objective=instruction", "data.path=x", prompt, *given)
        assert run.loop.sample_prompt == some[0]
        for override in given:
            key, _, text = override.removeprefix("data.").partition("=")
            assert getattr(run.data, key) == text


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("name='a, b'", "a, b"),
        ('name="a\'b"', "a'b"),
        ("name=\\${x}", "${x}"),
        ("name=lr-${optimizer.lr}", "lr-0.001"),
        ("name='lr-${optimizer.lr}'", "lr-0.001"),
        ("name=lr (${optimizer.lr})", "lr (0.001)"),
        ("name=null", "gpt124m"),
        ("+name=x", "x"),
        ("++name=a=b", "a=b"),
    ],
)
def test_overrides_of_hydra_keep_their_meaning(override: str, value: str) -> None:
    assert compose("train", [override, "optimizer.lr=1e-3"])["name"] == value


def test_null_is_a_value_of_keys_that_may_be_null() -> None:
    composed = compose("chat", ["system=null", "template=null"])
    assert (composed["system"], composed["template"]) == (None, None)
    assert compose("generate", ["prompt='quoted for Hydra'"])["prompt"] == "quoted for Hydra"


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("[q_proj,v_proj]", ["q_proj", "v_proj"]),
        (r"[blocks\.[0-3]\..*(query|value)]", [r"blocks\.[0-3]\..*(query|value)"]),
        (r"['blocks\.(0|1),x',head]", [r"blocks\.(0|1),x", "head"]),
        ("[a (1), b=c, 1e-3]", ["a (1)", "b=c", "1e-3"]),
        ("[]", []),
    ],
)
def test_items_of_a_list_of_texts_are_taken_as_typed(targets: str, expected: list[str]) -> None:
    assert compose("train", ["lora=lora", f"lora.targets={targets}"])["lora"]["targets"] == expected


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("name=a,b", ["name=a", "name=b"]),
        ("name=a (1),b=c", ["name='a (1)'", "name='b=c'"]),
        ('name="a,b",c', ['name="a,b"', "name=c"]),
        ("name=1e3,2e3", ["name='1e3'", "name='2e3'"]),
        ("optimizer.lr=1e-3,1e-4", ["optimizer.lr=1e-3", "optimizer.lr=1e-4"]),
        ("lora.targets=[a],[b(1)]", ["lora.targets=[a]", "lora.targets=['b(1)']"]),
        ("loop.sample_prompt='a','b'", ["loop.sample_prompt='a'", "loop.sample_prompt='b'"]),
    ],
)
def test_a_sweep_varies_texts(override: str, expected: list[str]) -> None:
    (typed,) = as_typed("train", [override], multirun=True)
    key = override.partition("=")[0]
    assert typed == f"{key}={','.join(one.removeprefix(f'{key}=') for one in expected)}"


def test_a_prompt_with_commas_is_one_value_of_a_sweep_and_so_is_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a,b.txt").touch()
    assert as_typed("train", ["loop.sample_prompt=a, b"], multirun=True) == ["loop.sample_prompt='a, b'"]
    assert as_typed("train", ["data.path=a,b.txt"], multirun=True) == ["data.path='a,b.txt'"]


def test_a_sweep_that_cannot_be_split_shows_the_quoting() -> None:
    with pytest.raises(ConfigError, match="with -m a comma separates values") as raised:
        as_typed("train", ["data.path=a [1,b.txt"], multirun=True)
    assert "data.path='\"'\"'a [1,b.txt'\"'\"''" in str(raised.value)


def test_rules_with_unquoted_patterns_show_the_quoting() -> None:
    with pytest.raises(ValueError, match=r"must be quoted, as in 'key=|must be quoted, as in 'optimizer.rules="):
        Run.compose("optimizer.rules=[{pattern:a(b|c),lr_multiplier:2}]")


def test_types_are_those_of_the_dataclasses() -> None:
    """The types are read from the source; here they are compared with those of the classes."""
    checked = 0
    for option in sorted(conf_dir().rglob("*.yaml")):
        if (target := target_of(option)) is None:
            continue
        cls = type_of(target)
        hints = {name: hint for name, hint in get_type_hints(cls).items() if "ClassVar" not in str(hint)}
        found = {name: hint for name, hint in fields(target).items() if "ClassVar" not in hint}
        assert found.keys() == hints.keys(), target
        for name, hint in hints.items():
            word = hint.__name__ if isinstance(hint, type) and "[" not in str(hint) else str(hint)
            is_text = word in ("str", "str | None", "list[str]", "list[str] | None")
            assert (found[name] == word) or not is_text, (target, name)
            assert is_text == (found[name] in ("str", "str | None", "list[str]", "list[str] | None")), (target, name)
        checked += 1
    assert checked > 50


def type_of(target: str) -> type:
    import importlib

    module, _, name = target.rpartition(".")
    return getattr(importlib.import_module(module), name)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run in a directory of an unusual name, trained on a file of one."""
    folder = tmp_path_factory.mktemp("named")
    (folder / "a (1), [x]=#.txt").write_text("Some words to train on. " * 20)
    path = folder / "~run=1 [a] (b), 'c'"
    Run.compose(*QUICK, "data=text", f"data.path={folder}/a (1), [x]=#.txt", f"run_dir={path}", "name=a,b=[c]").train()
    return path


def test_every_verb_takes_a_directory_of_any_name(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(run_dir.parent)
    name = run_dir.name
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["name"] == "a,b=[c]"
    assert main(["generate", name, 'prompt="Some', "max_tokens=2"]) == 0
    assert capfd.readouterr().out.startswith('"Some')
    assert main(["report", name, "output=a [1], b.png"]) == 0
    assert main(["verify", name, "replay_steps=0"]) == 0
    assert main(["resume", name, "loop.max_steps=2"]) == 0
    assert main(["resume", name, "run_dir=branch (1)", "loop.max_steps=3", "name=x=y"]) == 0
    assert (run_dir.parent / "branch (1)" / "config.yaml").exists()
    assert main(["train", "--from", name, "run_dir=again #2", "loop.max_steps=1"]) == 0
    assert yaml.safe_load((run_dir.parent / "again #2" / "config.yaml").read_text())["data"]["path"].endswith("=#.txt")
