"""The door: what is checked, what is refused, what is stored."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from transformers import GPT2Config

from llmtrain import Run
from llmtrain.cli.help import commented
from llmtrain.config import stored_config
from llmtrain.config.build import build
from llmtrain.config.secret_values import REDACTED, redact, redact_arguments
from llmtrain.config.stored_config import ConfigError
from llmtrain.optimizer.adamw import AdamW
from llmtrain.schedule import Schedule

CONF = Path(__file__).parents[2] / "conf"
GROUPS = sorted(p for p in CONF.iterdir() if p.is_dir() and p.name not in ("experiment", "__pycache__"))
OPTIONS = sorted((p.parent.name, p.stem) for group in GROUPS for p in group.glob("*.yaml"))
NEEDED = {  # values without a default
    "data": ["data.path=x"], "weights": ["weights.path=x"], "tokenizer": ["tokenizer.path=x"], "model": [],
}  # fmt: skip
BASE = ("weights=checkpoint", "weights.path=x")  # where what is adapted comes from
COMPANY = {  # options that go with some others alone
    "data=labelled": ["objective=classification"], "objective=classification": ["data=labelled", "data.path=x"],
    "objective=instruction": ["data=instruction", "data.path=x"], "lora=lora": BASE, "lora=rslora": BASE,
    "lora=dora": BASE, "model=auto": ["weights=huggingface", "weights.path=hf"],
}  # fmt: skip
OF_RECIPES = {
    "verdict": ["data.path=x"], "spam": ["model=laptop_gpt2", *BASE], "instruct": ["model=laptop", *BASE],
    "baichuan2_lora": ["model=baichuan2_7b", "weights.path=x", "data.path=x"],
    "classification": ["model=qwen2_5_0_5b", "weights.path=x", "data.path=x"],
    "chat": ["model=qwen2_5_0_5b", "weights.path=x", "data.path=x"],
}  # fmt: skip

TINY = ("model=tiny", "tokenizer=byte")


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_builds(group: str, option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    GPT2Config(n_layer=1, n_embd=8, n_head=1).save_pretrained("hf")  # for model=auto to read
    text = (CONF / group / f"{option}.yaml").read_text()
    needed = [override for override in NEEDED.get(group, []) if f"{override.split('.')[1].split('=')[0]}: ???" in text]
    run = Run.compose(f"{group}={option}", *needed, *COMPANY.get(f"{group}={option}", []))
    assert type(getattr(run, group)).__module__ != "builtins"


@pytest.mark.parametrize("recipe", sorted(p.stem for p in (CONF / "experiment").glob("*.yaml")))
def test_every_recipe_builds(recipe: str) -> None:
    assert Run.compose(f"experiment={recipe}", *OF_RECIPES.get(recipe, [])).name == recipe


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_key_is_listed_and_commented(group: str, option: str) -> None:
    """The YAML is the documentation: all keys of the dataclass, each with a comment."""
    import dataclasses
    import importlib

    text = (CONF / group / f"{option}.yaml").read_text()
    assert text.startswith("#")
    node = yaml.safe_load(text)
    if group == "model":
        assert "defaults" not in node
    module, _, name = node.pop("_target_").rpartition(".")
    fields = {f.name for f in dataclasses.fields(getattr(importlib.import_module(module), name))}
    assert set(node) == fields
    assert not fields - commented([CONF], f"{group}/{option}").keys()


def test_a_stored_config_gives_the_same_run() -> None:
    run = Run.compose(*TINY, "optimizer.lr=1e-4", "schedule.warmup_steps=7", "runtime.device=cpu")
    again = Run.from_config(yaml.safe_load(stored_config.dump(run)))
    assert again == run
    assert isinstance(run.optimizer, AdamW)
    assert run.optimizer.lr == 1e-4


def test_the_default_name_is_the_recipes_or_the_models() -> None:
    assert Run.compose("model=tiny").name == "tiny"
    assert Run.compose("experiment=laptop").name == "laptop"
    assert Run.compose("name=mine").name == "mine"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+optimizer.lrr=1", r"optimizer.lrr: no such key; did you mean optimizer.lr\?"),
        ("+nonsense=1", "nonsense: no such key"),
        ("optimizer.lr=abc", "optimizer.lr='abc'"),
        ("loop.max_steps=1.5", "loop.max_steps=1.5"),
        ("loop.max_steps=-3", "loop.max_steps=-3: must be at least 1"),
        ("runtime.device=tpu", "runtime.device=tpu"),
        ("data.sequence_length=99999", "data.sequence_length=99999: longer than model.context_length=1024"),
        ("weights=checkpoint", "weights.path: a value is required"),
    ],
)
def test_bad_values_are_named(override: str, message: str) -> None:
    with pytest.raises(Exception, match=message):
        Run.compose(override)


@dataclass(frozen=True)
class Elsewhere(Schedule):
    """A schedule outside of the package."""

    lr: float

    def __call__(self, step: int, *, peak: float, total: int) -> float:
        return self.lr


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("os.system", r"plugins=\[os\]"),
        ("builtins.open", "not a class of llmtrain"),
        ("llmtrain.config.compose.load", "not a dataclass defined in llmtrain.config.compose"),
        ("llmtrain.schedule.constant.dataclass", "not a dataclass defined"),
        ("llmtrain.optimizer.adamw.AdamW", r"not a llmtrain.schedule.Schedule"),
        ("llmtrain.nowhere.Thing", "there is no module llmtrain.nowhere"),
        ("llmtrainx.evil.Thing", "not a class of llmtrain"),
        (None, "must name a dataclass"),
        ("test_config.Elsewhere", r"plugins=\[test_config\]"),
    ],
)
def test_only_our_dataclasses_are_built(target: str | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build({"_target_": target, "lr": 1.0}, Schedule, path="schedule")


def test_a_plugin_is_built_when_named(monkeypatch: pytest.MonkeyPatch) -> None:
    node = {"_target_": f"{__name__}.Elsewhere", "lr": 1}
    built = build(node, Schedule, path="schedule", plugins=[__name__.split(".")[0]])
    assert built == Elsewhere(1.0)
    assert isinstance(built.lr, float)


def test_interpolations_in_a_stored_config_are_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interpolation in a stored config is a piece of text."""
    monkeypatch.setenv("PRIVATE", "leaked")
    values = yaml.safe_load(stored_config.dump(Run.compose(*TINY)))
    values["loop"]["sample_prompt"] = "${oc.env:PRIVATE}"
    assert Run.from_config(values).loop.sample_prompt == "${oc.env:PRIVATE}"


def test_secrets_are_not_stored() -> None:
    values = {"metrics": {"api_key": "hush", "log_every": 1, "password": None}, "token": "t", "sample_tokens": 5}
    redacted = redact(values)
    assert redacted["metrics"] == {"api_key": REDACTED, "log_every": 1, "password": None}
    assert redacted["token"] == REDACTED
    assert redacted["sample_tokens"] == 5
    assert redact_arguments(["train", "metrics.api_key=hush", "a=b"]) == [
        "train",
        f"metrics.api_key={REDACTED}",
        "a=b",
    ]


def test_a_secret_of_the_environment_is_not_stored_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", "hush")
    with pytest.raises(ConfigError, match=r"name=.*a secret"):
        Run.compose("name='${oc.env:MY_API_KEY}'")


def test_a_flat_config_has_dotted_keys() -> None:
    assert stored_config.flatten({"a": {"b": 1, "c": {"d": 2}}, "e": []}) == {"a.b": 1, "a.c.d": 2, "e": []}


@pytest.mark.parametrize("value", ["[[0.9],0.95]", "[{a:1},0.95]"])
def test_a_list_of_numbers_holds_numbers_alone(value: str) -> None:
    with pytest.raises(ValueError, match=r"optimizer\.betas"):
        Run.compose("model=tiny", f"optimizer.betas={value}")
