"""What is quiet; what is trained, at which rate, in which arithmetic."""

import re
from pathlib import Path

import pytest
import torch

from llmtrain import Run
from llmtrain.base.device import has_native_bf16
from llmtrain.config.assemble import Parts
from llmtrain.lint import Case, lint
from llmtrain.lint.rates import adamw_rate
from tests.lint.findings import QUIET, find, find_in, parts_of

ROOT = Path(__file__).parents[2]

# --- what must be quiet -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overrides", [(), ("tokenizer=gpt2", "loop.max_steps=100"), ("data=python_stdlib",)])
def test_the_defaults_raise_no_warning(overrides: tuple[str, ...]) -> None:
    assert find(*overrides) == {}


@pytest.mark.parametrize("group", ["optimizer", "schedule", "clipping", "accumulation", "checkpoint", "recovery"])
def test_no_option_raises_a_warning(group: str) -> None:
    for option in sorted(path.stem for path in (ROOT / "conf" / group).glob("*.yaml")):
        more = ("loop.max_steps=700",) if group == "accumulation" else ()  # the ramp needs time to rise
        assert find(f"{group}={option}", *more) == {}, option


def test_the_recipes_raise_no_warning() -> None:
    for laptop in ("laptop", "laptop_gpt2"):
        assert find_in(f"experiment={laptop}") == {}
    assert (
        find_in("experiment=verdict", f"data.path={ROOT / 'data' / 'lighthouse.txt'}") == {}
    )  # 15 epochs, but it says so
    default = find_in("model=gpt124m", "loop.max_steps=1000")
    assert list(default) == ["loop.max_steps"]  # GPT-124M for 1,000 steps on the language reference: some 90 epochs
    said = re.search(r"goes ([\d.]+) times through ([\d,]+) training tokens", default["loop.max_steps"].message)
    epochs, tokens = (float(figure.replace(",", "")) for figure in said.groups())
    assert 80_000 < tokens < 110_000  # more with every version of Python: 89,000 in 3.11
    assert epochs == pytest.approx(1000 * 8 * 1024 / tokens, rel=0.01)


def test_the_default_model_on_a_cpu_is_reported() -> None:
    message = find_in("loop.max_steps=40")["model"].message
    assert "124 million parameters are for a GPU" in message
    assert "experiment=laptop" in message
    for chosen in ("model=gpt124m", "experiment=laptop"):
        assert "model" not in find_in(chosen, "loop.max_steps=40")


# --- what is trained ---------------------------------------------------------------------------------------------


def test_a_model_without_trainable_parameters_is_reported() -> None:
    def freeze(parts: Parts) -> Parts:
        parts.unit.requires_grad_(False)
        return parts

    found = find(change=freeze)["lora"]
    assert found.level == "error"
    assert "every parameter of the model is frozen" in found.message
    found = find("optimizer.rules=[{pattern:.,lr_multiplier:0}]")["optimizer.rules"]
    assert found.level == "error"
    assert find("optimizer.rules=[{pattern:blocks,lr_multiplier:0}]") == {}


def test_a_parameter_missing_in_the_optimizer_is_reported() -> None:
    def forget(parts: Parts) -> Parts:
        parts.optimizer.param_groups[-1]["params"].pop()
        return parts

    found = find(change=forget)["optimizer"]
    assert "1 of 28 parameters are in none of its groups and keep their values: final_norm.bias" in found.message


def test_clipping_that_never_begins_is_reported() -> None:
    message = find("clipping.start_step=200")["clipping.start_step"].message
    assert "the run ends after 200 steps, so that no gradient is ever clipped" in message
    assert find("clipping.start_step=199") == {}


def test_arithmetic_that_the_device_emulates_is_reported() -> None:
    assert "on a CPU precision=auto is as fast" in find("precision=fp16")["precision"].message
    native = has_native_bf16(torch.device("cpu"))
    assert set(find("precision=bf16")) == (set() if native else {"precision"})
    assert find("precision=fp32") == {}


@pytest.mark.parametrize(("capability", "warns"), [((7, 5), True), ((8, 0), False)])
def test_bf16_that_a_gpu_emulates_is_reported(
    capability: tuple[int, int], warns: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    found = find_in(*QUIET, "precision=bf16", device="cuda")
    assert set(found) == ({"precision"} if warns else set())
    if warns:
        assert "this GPU does not compute in bf16 but emulates it" in found["precision"].message
        assert found["precision"].message.endswith("precision=fp16")


def test_fp8_that_does_not_pay_is_reported() -> None:
    small = find_in(*QUIET, "precision=fp8", device="cuda")["precision"].message
    assert "the products of less than about 1 billion save no more time than rounding to 8 bits takes" in small
    large = ("model=gpt1558m", "loop.max_steps=20", "precision=fp8")
    assert "precision" not in find_in(*large, device="cuda")
    eager = find_in(*large, "runtime.compile=false", device="cuda")["runtime.compile"].message
    assert eager.endswith("runtime.compile=true, or precision=bf16")


def test_a_long_run_without_saves_is_reported() -> None:
    long = ("loop.max_steps=1000", "loop.eval_every=0", "loop.sample_every=0", "accumulation.batch_size=4")
    message = find(*long, "checkpoint.every_steps=0")["checkpoint.every_steps"].message
    assert "a kill or a crash loses up to 1,000 steps; checkpoint.every_steps=50" in message
    assert find(*long, "checkpoint.every_steps=500") == {}
    assert find(*long, "checkpoint.every_steps=0", "checkpoint.every_minutes=10") == {}
    assert find(*long, "checkpoint.every_steps=0", "loop.eval_every=100") == {}  # saved ahead of each
    assert find("loop.eval_every=0", "loop.sample_every=0", "checkpoint.every_steps=0") == {}  # 200 steps


# --- learning rates ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "key", "level"),
    [
        (("schedule.warmup_steps=200",), "schedule.warmup_steps", "warning"),
        (("schedule.warmup_steps=150",), None, None),
        (("schedule.warmup_ratio=1.0",), "schedule.warmup_ratio", "warning"),
        (("schedule.warmup_steps=1000000",), "schedule.warmup_steps", "error"),
        (("schedule.warmup_steps=1000000", "schedule.initial_lr=1e-4"), "schedule.warmup_steps", "warning"),
        (("schedule.warmup_steps=1", "loop.max_steps=1"), "schedule.warmup_steps", "error"),
        (("schedule=linear_warmup_cosine_lr", "schedule.init_lr=0"), "schedule", "error"),
        (("schedule=linear_warmup_cosine_lr", "schedule.warmup_steps=300"), "schedule.warmup_steps", "warning"),
        (("schedule=exponential", "schedule.decay_rate=0.1", "schedule.decay_steps=5", "schedule.min_lr=0"),
         "schedule", "warning"),
        (("schedule=exponential", "schedule.decay_rate=0.1", "schedule.decay_steps=50", "schedule.min_lr=0"),
         None, None),
    ],
)  # fmt: skip
def test_schedules_that_do_not_suit_the_run_are_reported(
    overrides: tuple[str, ...], key: str | None, level: str | None
) -> None:
    found = find(*overrides)
    assert {finding.key: finding.level for finding in found.values() if not finding.key.startswith("optimizer")} == (
        {key: level} if key else {}
    )


def test_a_schedule_cut_short_is_reported_with_the_rate_it_reaches() -> None:
    message = find("schedule.warmup_steps=400", "optimizer.lr=1e-3")["schedule.warmup_steps"].message
    assert message == (
        "schedule.warmup_steps=400: the warm-up takes all 200 steps of the run: the learning rate reaches 0.0005 of "
        "0.001 and never decays; schedule.warmup_steps=10, or more loop.max_steps"
    )


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (("optimizer.lr=0.1",), "optimizer.lr"),
        (("optimizer.lr=1e-2",), None),
        (("optimizer.lr=1e-5",), "optimizer.lr"),
        (("optimizer.lr=1e-5", "weights=checkpoint", "weights.path=x"), None),  # fine-tuning
        (("optimizer=sgd", "optimizer.lr=3e-4"), "optimizer.lr"),  # AdamW's
        (("optimizer=sgd", "optimizer.lr=1.0", "optimizer.momentum=0", "optimizer.nesterov=false"), None),
        (("optimizer=lion", "optimizer.lr=1e-2"), "optimizer.lr"),
        (("optimizer=muon", "optimizer.lr=0.02"), "optimizer.lr"),  # for the other way of adjusting
        (("optimizer=muon", "optimizer.lr=0.02", "optimizer.adjust_lr_fn=original", "optimizer.adamw_lr=1e-3"), None),
        (("optimizer=muon", "optimizer.lr=0.02", "optimizer.adjust_lr_fn=original"), "optimizer.adamw_lr"),
        (("optimizer=muon", "optimizer.lr=0.01", "optimizer.adamw_lr=0.02"), None),  # embeddings take larger rates
        (("optimizer=muon", "optimizer.adamw_lr=0.5"), "optimizer.adamw_lr"),
        (("optimizer=muon", "optimizer.adamw_lr=1e-5"), "optimizer.adamw_lr"),
        (("optimizer=adafactor", "optimizer.lr=3e-4"), "optimizer.lr"),
        (("schedule=linear_warmup_cosine_lr", "schedule.init_lr=0.5"), "schedule.init_lr"),
    ],
)
def test_unusual_learning_rates_are_reported(overrides: tuple[str, ...], key: str | None) -> None:
    assert set(find(*overrides)) == ({key} if key else set())


def test_usual_learning_rates_follow_the_size_of_the_model() -> None:
    assert adamw_rate(125_000_000) == pytest.approx(6e-4)  # GPT-3 small
    assert adamw_rate(175_000_000_000) == pytest.approx(0.6e-4)  # GPT-3
    assert 1.2e-4 < adamw_rate(3_000_000_000) < 1.6e-4
    assert adamw_rate(100) == pytest.approx(1.8e-3)
    assert "about 0.0006" in find_in("model=gpt124m", "loop.max_steps=40", "optimizer.lr=0.1")["optimizer.lr"].message


@pytest.mark.parametrize(
    ("overrides", "key", "texts"),
    [
        (("accumulation.batch_size=32",), "accumulation.batch_size",
         ("8,192 tokens, in the recipe laptop_gpt2 2,048", "optimizer.lr=0.002 was", "optimizer.lr=0.004 goes")),
        (("data.sequence_length=128",), "data.sequence_length", ("1,024 tokens, in the recipe laptop_gpt2 2,048",)),
        (("model=gpt30m",), "data.sequence_length", ("4,096 tokens, in the recipe laptop_gpt2 2,048",)),
        (("accumulation.batch_size=32", "optimizer.lr=2e-3"), None, ()),
        (("accumulation.batch_size=9",), None, ()),
        (("accumulation.micro_batch_size=4",), None, ()),
    ],
)  # fmt: skip
def test_another_batch_size_than_the_recipes_is_reported(
    overrides: tuple[str, ...], key: str | None, texts: tuple[str, ...]
) -> None:
    found = find_in("experiment=laptop_gpt2", "loop.max_steps=30", "loop.eval_every=10", *overrides)
    assert set(found) == ({key} if key else set())
    assert key is None or all(text in found[key].message for text in texts)


def test_the_batch_size_of_a_users_recipe_is_compared(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\naccumulation:\n  batch_size: 2\n")
    run = Run.compose(*QUIET, "experiment=mine", "accumulation.batch_size=8", config_dir=tmp_path)
    (found,) = lint(Case.of(run, parts_of(run), run.overrides))
    assert "a step takes 512 tokens, in the recipe mine 2,048" in found.message  # 2 of the default model's 1,024


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("data.sequence_length=32",), None),  # examples are as long as they are
        (("accumulation.batch_size=4",), "a step takes 4 sequences, in the recipe spam 16"),
    ],
)
def test_the_batch_size_of_a_recipe_of_examples_is_compared(
    tmp_path: Path, overrides: tuple[str, ...], said: str | None
) -> None:
    base = Run.compose("model=tiny", "tokenizer=byte", "loop.max_steps=1", f"run_dir={tmp_path / 'base'}").train()
    run = Run.compose("experiment=spam", "tokenizer=byte", "weights=checkpoint", f"weights.path={base.run_dir}",
                      "data.sequence_length=64", *overrides)  # fmt: skip
    (*found,) = (f.message for f in lint(Case.of(run, parts_of(run), run.overrides)) if "in the recipe" in f.message)
    assert len(found) == (said is not None)
    assert said is None or said in found[0]
