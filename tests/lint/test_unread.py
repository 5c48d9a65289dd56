"""Keys that nothing reads: each rule with runs in which it holds and in which it does not."""

import dataclasses
import importlib
import re
import sys
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest

from llmtrain import Run
from llmtrain.base.options import RunFacts
from llmtrain.config.overrides import overrides_of
from llmtrain.lint import lint
from llmtrain.lint.case import Case
from llmtrain.lint.unread import between_groups, of_options, unread_keys
from llmtrain.schedule import Schedule
from tests.lint.findings import QUIET, find, parts_of

STEP = ("schedule=step", "schedule.every=null")
WSD = ("schedule=wsd",)
RAMP = ("accumulation=ramp",)
LAVIS = ("schedule=linear_warmup_cosine_lr",)
LIGHTHOUSE = ("data=text", f"data.path={Path(__file__).parents[2] / 'data' / 'lighthouse.txt'}")  # of a fixed length

# (what makes the key inert, the key with its value, what the message names, what makes it be read)
CASES = [
    ((*LIGHTHOUSE, "loop.max_steps=9"), "loop.epochs=2", "loop.max_steps=9 ends the run first, after 0.208 epochs",
     (*LIGHTHOUSE, "loop.max_steps=null")),
    ((*LIGHTHOUSE, "loop.epochs=0.5"), "loop.max_steps=50", "loop.epochs=0.5 ends the run first, after 22 steps",
     (*LIGHTHOUSE, "loop.epochs=null", "loop.max_steps=50")),
    ((), "loop.whole_batches=true", "is about the end of loop.epochs",
     ("loop.max_steps=null", "loop.epochs=0.1")),
    (("data.validation_fraction=0",), "loop.eval_every=50", "there are no validation data", ()),
    (("loop.eval_every=0",), "loop.eval_batches=3", "nothing is evaluated with loop.eval_every=0", ()),
    ((), "loop.eval_every=201", "the run ends after 200 steps", ("loop.max_steps=201",)),
    (("loop.sample_every=0",), "loop.sample_prompt=Sea", "no text is sampled", ("loop.sample_every=9",)),
    (("loop.sample_temperature=0",), "loop.sample_top_k=5", "always the most likely token", ()),
    ((), "loop.sample_every=201", "the run ends after 200 steps", ("loop.max_steps=201",)),
    ((), "metrics.log_every=300", "the first and the last are logged", ("loop.max_steps=300",)),
    (("schedule.warmup_steps=5",), "schedule.warmup_ratio=0.1", "schedule.warmup_steps=5 is used instead", ()),
    (("schedule=constant",), "schedule.initial_lr=1e-5", "there is none", ("schedule.warmup_steps=5",)),
    ((*WSD, "schedule.decay_steps=9"), "schedule.decay_ratio=0.1", "schedule.decay_steps=9 is used instead", WSD),
    ((*WSD, "schedule.decay_ratio=0"), "schedule.min_lr=1e-5", "never decays", WSD),
    ((*STEP,), "schedule.milestones=[200,300]", "before the learning rate drops", (*STEP, "loop.max_steps=201")),
    (("schedule=step",), "schedule.factor=0.1", "before the learning rate drops",
     ("schedule=step", "schedule.every=9")),
    ((*LAVIS, "schedule.init_lr=1e-3"), "optimizer.lr=5e-4", "schedule.init_lr=0.001 is the peak", LAVIS),
    (("precision=fp16",), "precision.growth_interval=300", "before the loss scale can grow",
     ("precision=fp16", "loop.max_steps=300")),
    ((), "accumulation.micro_batch_size=32", "a step has 8 sequences at most; for larger steps raise "
     "accumulation.batch_size", ("accumulation.batch_size=32",)),
    ((), "accumulation=ramp", "before the batch grows", ("loop.max_steps=600",)),
    (RAMP, "accumulation.stages=[{start:0,batch_size:2},{start:9,batch_size:4},{start:200,batch_size:8}]",
     "before the last stage", (*RAMP, "loop.max_steps=201")),
    ((*RAMP, "accumulation.unit=tokens"), "accumulation.stages=[{start:0,batch_size:2},{start:25600,batch_size:4}]",
     "before the last stage", (*RAMP, "accumulation.unit=tokens", "loop.max_steps=201")),
    (("recovery.skip_after=0",), "recovery.skip_batches=5", "no data are skipped", ()),
    (("recovery.rollback_after=0",), "recovery.rollback_steps=5", "the run never rolls back", ()),
    (("recovery.lower_rate_at=0",), "recovery.lower_rate_steps=5", "the learning rate is never lowered", ()),
    (("recovery.loss_deviations=0",), "recovery.loss_floor=0.1", "the loss is not judged", ()),
    (("recovery.grad_norm_deviations=0",), "recovery.grad_norm_floor=0.3", "gradient norms are not judged", ()),
    (("loop.max_steps=32", "loop.eval_every=9"), "recovery.loss_deviations=9", "recovery.min_window_steps=32", ()),
    (("activation_checkpointing=selective",), "activation_checkpointing.every=1",
     "operations are selected, in every block",
     ("activation_checkpointing=selective", "activation_checkpointing.by=block")),
    (("weights=checkpoint", "weights.path=x"), "model.initialisation=torch", "every weight is loaded", ()),
    (("model=llama_tiny", "weights=checkpoint", "weights.path=x"), "model.initial_std=0.03", "every weight is loaded",
     ("model=llama_tiny",)),
    (("run_dir=here",), "output_dir=there", "run_dir=here is the directory", ()),
    ((), "checkpoint.every_steps=500", "where one is written in any case", ("loop.max_steps=500",)),
    (("checkpoint.keep_last=0",), "checkpoint.keep_best=1", "checkpoint.keep_last=0 keeps all", ()),
    (("data.validation_fraction=0",), "checkpoint.keep_best=1", "there are no validation data", ()),
    (("loop.eval_every=0",), "checkpoint.keep_best=1", "nothing is evaluated", ()),
    (("loop.max_steps=4",), "runtime.profile=true", "from step 5 on", ("loop.max_steps=5",)),
    ((), "checkpoint.keep_every=400", "no step is a multiple", ("loop.max_steps=400",)),
    (("distributed=local_sgd",), "distributed.sync_every=500", "the only exchange is made in any case",
     ("distributed=local_sgd", "loop.max_steps=501")),
]  # fmt: skip


@cache
def case_of(*overrides: str) -> Case:
    run = Run.compose(*QUIET, *overrides)
    return Case.of(run, parts_of(run), run.overrides)


@pytest.mark.parametrize(("inert", "override", "text", "read"), CASES, ids=[case[1].split("=[")[0] for case in CASES])
def test_a_key_without_effect_is_reported_and_one_with_effect_is_not(
    inert: tuple[str, ...], override: str, text: str, read: tuple[str, ...]
) -> None:
    key = override.partition("=")[0]
    case = case_of(*inert, override)
    (message,) = (finding.message for finding in unread_keys(case) if finding.key == key)
    assert message.startswith(f"{override}: has no effect: ")
    assert text in message
    assert re.search(r"; \S+", message)  # what would work
    assert not list(
        unread_keys(dataclasses.replace(case, overrides=()))
    )  # what the user has not set is nobody's concern
    assert key not in find(*read, override)


def write(path: Path, tokens: int) -> None:
    path.parent.mkdir(exist_ok=True)
    np.random.default_rng(tokens).integers(0, 256, tokens).astype(np.uint16).tofile(path)


def test_validation_fraction_has_no_effect_beside_validation_files(tmp_path: Path) -> None:
    write(tmp_path / "tokens" / "train.bin", 200_000)
    write(tmp_path / "tokens" / "val.bin", 20_000)
    shards, fraction = ("data=shards", f"data.path={tmp_path / 'tokens'}"), "data.validation_fraction=0.2"
    assert (
        "named val or validation are the validation data" in find(*shards, fraction)["data.validation_fraction"].message
    )
    assert find(*shards) == {}
    alone = ("data=shards", f"data.path={tmp_path / 'tokens' / 'train.bin'}")
    assert find(*alone, fraction) == {}
    named = (*alone, f"data.validation_path={tmp_path / 'tokens' / 'val.bin'}")
    assert "val.bin is the validation data" in find(*named, fraction)["data.validation_fraction"].message


def write_text(path: Path) -> Path:
    path.write_text("".join(f"line {number} of {path.name}\n" for number in range(2_000)), encoding="utf-8")
    return path


def test_every_line_of_every_rule_has_a_case(tmp_path: Path) -> None:
    """So that none is a typing error."""
    write(tmp_path / "tokens" / "train.bin", 200_000)
    write(tmp_path / "tokens" / "val.bin", 20_000)
    shards, validation = ("data=shards", f"data.path={tmp_path / 'tokens'}"), tmp_path / "tokens" / "val.bin"
    cases = [case_of(*unread, override) for unread, override, _, _ in CASES]
    cases += [case_of(*shards), case_of(*shards, f"data.validation_path={validation}")]
    cases += [case_of(*shards, "data.validation_fraction=0"), case_of("data=shards", f"data.path={validation}")]
    text = write_text(tmp_path / "text.txt")
    cases += [case_of("data=text", f"data.path={text}", f"data.validation_path={write_text(tmp_path / 'more.txt')}")]
    trained = ("weights=checkpoint", "weights.path=x")
    cases += [case_of("data=text", f"data.path={text}")]
    adapting = Run.compose(*QUIET, "lora=lora", *trained)
    cases += [dataclasses.replace(case_of(*trained), run=adapting)]
    cases += [case_of("precision=fp16", "precision.growth_interval=9")]
    cases += [case_of("activation_checkpointing=selective", "activation_checkpointing.by=block")]
    codes = {between_groups.__code__, *(rule.__code__ for rule in option_rules())}
    missing = {(code, line) for code in codes for _, _, line in code.co_lines() if line and line > code.co_firstlineno}

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        missing.discard((frame.f_code, frame.f_lineno))
        return trace if frame.f_code in codes else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        for case in cases:
            list(unread_keys(case))
    finally:
        sys.settrace(before)
    assert not [f"{Path(code.co_filename).name}:{line}" for code, line in missing]


def option_rules() -> list[Any]:
    """Every rule that an option of ``conf/`` has, inherited ones too."""
    options = []
    for path in (Path(__file__).parents[2] / "conf").glob("*/*.yaml"):
        for target in re.findall(r"^_target_: (\S+)", path.read_text(), re.MULTILINE):
            module, _, name = target.rpartition(".")
            options.append(getattr(importlib.import_module(module), name))
    bases = {cls for option in options for cls in option.__mro__}
    return [vars(cls)["unread"] for cls in bases if "unread" in vars(cls)]


def test_the_keys_that_options_report_are_theirs() -> None:
    for unread, override, _, _ in CASES:
        case = case_of(*unread, override)
        for key in of_options(case):
            group, _, name = key.partition(".")
            assert hasattr(getattr(case.run, group), name) if name else hasattr(case.run, group), key


def test_the_keys_of_the_rules_between_groups_exist() -> None:
    case = case_of("weights=checkpoint", "weights.path=x", "schedule=linear_warmup_cosine_lr", "schedule.init_lr=1e-3",
                   "loop.max_steps=1", "runtime.profile=true", "run_dir=here")  # fmt: skip
    keys = {"output_dir"}
    for path in (Path(__file__).parents[2] / "conf").glob("*/*.yaml"):
        keys |= {f"{path.parent.name}.{key}" for key in re.findall(r"^(\w+):", path.read_text(), re.MULTILINE)}
    assert len(between_groups(case)) == 5
    assert between_groups(case).keys() <= keys


@dataclasses.dataclass(frozen=True)
class Flat(Schedule):
    """A schedule as a plug-in may have it, with a rule of its own."""

    rate: float
    floor: float

    def __call__(self, step: int, *, peak: float, total: int) -> float:
        return self.rate

    def unread(self, run: RunFacts) -> dict[str, str]:
        return {"floor": f"{run.end} at schedule.rate; leave it out", self.ITSELF: "it never warms up; warmup_cosine"}


def test_a_plugin_reports_its_unread_keys() -> None:
    case = case_of()
    run = dataclasses.replace(case.run, schedule=Flat(1e-3, 0.1))
    given = ("schedule=flat", "schedule.floor=0.1", "schedule.rate=1e-3")
    assert [finding.message for finding in unread_keys(dataclasses.replace(case, run=run, overrides=given))] == [
        "schedule=flat: has no effect: it never warms up; warmup_cosine",
        "schedule.floor=0.1: has no effect: the run ends after 200 steps at schedule.rate; leave it out",
    ]


def test_overrides_are_found_on_a_command_line() -> None:
    command = ["llmtrain", "train", "-m", "model=tiny", "+plugins=[x]", "--config-dir", "/mine",
               "optimizer.lr=1e-4,1e-3", "loop.sample_prompt=a=b", "~lora", "--debug"]  # fmt: skip
    overrides = overrides_of(command)
    assert overrides == ["model=tiny", "+plugins=[x]", "optimizer.lr=1e-4,1e-3", "loop.sample_prompt=a=b",
                         "hydra.searchpath=['file:///mine']"]  # fmt: skip
    case = case_of()
    given = dataclasses.replace(case, overrides=overrides).given
    assert given["plugins"] == "[x]"
    assert given["loop.sample_prompt"] == "a=b"


def test_lint_knows_the_overrides_given_to_compose(tmp_path: Path) -> None:
    run = Run.compose(*QUIET, "loop.eval_every=0", "loop.eval_batches=3", config_dir=tmp_path)
    assert run.overrides[-1] == f"hydra.searchpath=['file://{tmp_path}']"
    assert [finding.key for finding in lint(Case.of(run, parts_of(run), run.overrides))] == ["loop.eval_batches"]
    assert lint(Case.of(run, parts_of(run), ())) == []
