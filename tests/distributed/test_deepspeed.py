"""``distributed=deepspeed`` before anything starts: its keys, and DeepSpeed's JSON beside the config of a run."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmtrain.config import stored_config
from llmtrain.config.stored_config import ConfigError
from llmtrain.distributed import deepspeed
from llmtrain.distributed.checks import ParallelSettings, problems
from llmtrain.distributed.deepspeed import VERSION, DeepSpeed, check_installed, check_version, read_config
from llmtrain.distributed.deepspeed_agreement import RunValues, check_agreement
from llmtrain.run.run import Run
from tests.helpers.options import make_option

BAICHUAN = {  # as published with Baichuan 2
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": 1.0,
    "bf16": {"enabled": "auto"},
    "zero_optimization": {"stage": 3, "overlap_comm": True, "stage3_gather_16bit_weights_on_model_save": True},
    "flops_profiler": {"enabled": False, "profile_step": 1, "module_depth": -1, "detailed": True, "output_file": None},
}


def option(group: str, name: str, **keys: Any) -> Any:
    return make_option(group, name, {"lr": 3e-4}, **keys)


def options(config: Any = None, **keys: Any) -> DeepSpeed:
    """The option of the group, with DeepSpeed's JSON ``config``."""
    found: DeepSpeed = option(
        "distributed", "deepspeed", config=None if config is None else json.dumps(config), processes=2, **keys
    )
    return found


def check(config: Any, **changes: Any) -> None:
    """Check the JSON ``config`` beside a run on two processes, with ``changes``."""
    run = RunValues(
        processes=2,
        accumulation=option("accumulation", "fixed", batch_size=8, micro_batch_size=2),
        clipping=option("clipping", "norm"),
        optimizer=option("optimizer", "adamw"),
        schedule=option("schedule", "constant", warmup_steps=0),
        precision=option("precision", "fp32"),
        log_every=10,
        max_steps=40,
    )
    check_agreement(options(config).given, replace(run, **changes))


# --- what is taken --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_stage_is_enough(stage: int) -> None:
    assert options(zero_stage=stage).settings()["zero_optimization"] == {"stage": stage}


def test_without_stage_and_json_it_is_zero_2() -> None:
    assert options().stage == 2


def test_published_json_is_taken() -> None:
    check(BAICHUAN)
    settings = options(BAICHUAN).settings()
    assert settings["zero_optimization"] == BAICHUAN["zero_optimization"]
    assert settings["gradient_clipping"] == 0  # it is done once, here
    assert "bf16" not in settings
    assert settings["flops_profiler"]["module_depth"] == -1


def test_auto_of_deepspeeds_own_keys_is_its_default() -> None:
    zero = {"stage": 3, "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": 5e7, "offload_param": None}
    assert options({"zero_optimization": zero}).settings()["zero_optimization"] == {
        "stage": 3,
        "stage3_prefetch_bucket_size": 5e7,
    }


AGREES: list[dict[str, Any]] = [
    {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2},
    {"optimizer": {"type": "AdamW", "params": {"lr": 3e-4, "betas": "auto", "torch_adam": True}}},
    {"optimizer": {"type": "Adam"}},  # which is AdamW there, but for adam_w_mode=false
    {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 0, "warmup_max_lr": 3e-4}}},
    {"bf16": {"enabled": False}, "fp16": {"enabled": False, "hysteresis": 2}, "steps_per_print": 10},
    {"zero_optimization": {"offload_optimizer": {"device": "none"}}, "gradient_predivide_factor": 1.0},
    {"tensorboard": {"enabled": False, "output_path": "x"}, "communication_data_type": "fp32"},
    {"data_types": {"grad_accum_dtype": "fp32"}},
]


@pytest.mark.parametrize("config", AGREES, ids=lambda config: next(iter(config)))
def test_keys_that_say_the_same_are_taken(config: dict[str, Any]) -> None:
    check(config)


# --- contradictions -------------------------------------------------------------------------------------------------

NO_CLIPPING = {"clipping": ("clipping", "none")}
FP16, AUTO = {"precision": ("precision", "fp16")}, {"precision": ("precision", "auto")}
CONTRADICTS: list[tuple[dict[str, Any], dict[str, tuple[str, str]], str]] = [
    ({"train_batch_size": 16}, {}, "16, and accumulation.batch_size=8 here; take accumulation.batch_size=16"),
    ({"train_micro_batch_size_per_gpu": 4}, {}, "micro_batch_size=2 on 2 processes makes 2 here; take"),
    ({"gradient_accumulation_steps": 1}, {}, "makes 2 here; take another accumulation.micro_batch_size"),
    ({"gradient_clipping": 0.5}, {}, "clipping.max_norm=1.0 here; take clipping.max_norm=0.5"),
    ({"gradient_clipping": 0.5}, NO_CLIPPING, "clipping=none here; take clipping=norm clipping.max_norm=0.5"),
    ({"bf16": {"enabled": True}}, {}, "bf16.enabled=true, and precision=fp32 here; take precision=bf16"),
    ({"fp16": {"enabled": True}}, AUTO, "fp16.enabled=true, and precision=auto here; take precision=fp16"),
    ({"fp16": {"loss_scale_window": 1000}}, FP16, "precision.growth_interval=2000 here"),
    ({"fp16": {"hysteresis": 2}}, FP16, 'fp16.hysteresis=2: training here is as with 1'),
    ({"optimizer": {"type": "SGD"}}, {}, 'optimizer.type="SGD", and optimizer=adamw here; take optimizer=sgd'),
    ({"optimizer": {"type": "Adam", "params": {"adam_w_mode": False}}}, {}, "take optimizer=adam"),
    ({"optimizer": {"params": {"lr": 1e-5}}}, {}, "optimizer.params.lr=1e-05, and optimizer.lr=0.0003 here"),
    ({"optimizer": {"params": {"betas": [0.9, 0.98]}}}, {}, "and optimizer.betas="),
    ({"scheduler": {"type": "WarmupDecayLR"}}, {}, "schedule=constant here; take schedule=constant for WarmupLR"),
    ({"scheduler": {"params": {"total_num_steps": 10}}}, {}, "loop.max_steps=40 here; take loop.max_steps=10"),
    ({"scheduler": {"params": {"warmup_num_steps": 9}}}, {}, "schedule.warmup_steps=0 here"),
    ({"steps_per_print": 7}, {}, "metrics.log_every=10 here; take metrics.log_every=7"),
    ({"data_types": {"grad_accum_dtype": "bf16"}}, {}, "data_types.grad_accum_dtype"),
]  # fmt: skip


@pytest.mark.parametrize(("config", "changes", "message"), CONTRADICTS, ids=[str(c) for c, _, _ in CONTRADICTS])
def test_contradictions_name_both_values(
    config: dict[str, Any], changes: dict[str, tuple[str, str]], message: str
) -> None:
    with pytest.raises(ValueError, match=r"^distributed\.config: ") as error:
        check(config, **{key: option(*names) for key, names in changes.items()})
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_two_stages_are_a_contradiction() -> None:
    with pytest.raises(ConfigError, match=r"zero_optimization.stage=3, and zero_stage=1; take zero_stage=3"):
        options({"zero_optimization": {"stage": 3}}, zero_stage=1)


REFUSES: list[tuple[dict[str, Any], str]] = [
    ({"zero_optimisation": {}}, "zero_optimisation: DeepSpeed has no such key; did you mean zero_optimization?"),
    ({"zero_optimization": {"overlap_com": True}}, "overlap_com: DeepSpeed has no such key; did you mean overlap_comm"),
    ({"optimizer": {"params": {"lrr": 1}}}, "optimizer.params.lrr: DeepSpeed has no such key; did you mean lr?"),
    ({"zero_optimization": {"stage": 0}}, "zero_optimization.stage=0: must be 1, 2 or 3 (distributed=ddp for 0)"),
    ({"zero_optimization": True}, "zero_optimization=true: must be an object"),
    ({"wall_clock_breakdown": "yes"}, 'wall_clock_breakdown="yes": must be true or false'),
    ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "nothing is moved to the host"),
    ({"zero_optimization": {"zero_hpz_partition_size": 2}}, "take distributed=hsdp"),
    ({"tensorboard": {"enabled": True}}, "take metrics=tensorboard"),
    ({"activation_checkpointing": {"partition_activations": True}}, "take activation_checkpointing=full"),
    ({"gradient_predivide_factor": 2.0}, "remove it"),
    ({"flops_profiler": {"output_file": "x"}}, "flops_profiler.output_file=\"x\": must be null"),
    ({"comms_logger": {"enabled": True}}, "comms_logger.verbose=true"),
]  # fmt: skip


@pytest.mark.parametrize(("config", "message"), REFUSES, ids=[str(config) for config, _ in REFUSES])
def test_other_keys_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=r"^config: ") as error:
        options(config)
    assert message in str(error.value)


REFUSED_KEYS: dict[str, Any] = {
    "tensor": (2, "take distributed=tensor"),
    "shard": (1, "shard=-1"),
    "zero_stage": (4, "must be 1, 2 or 3"),
    "reshard_after_forward": (False, "stage3_max_live_parameters"),
}


@pytest.mark.parametrize("key", REFUSED_KEYS)
def test_keys_of_other_meshes_are_refused(key: str) -> None:
    value, message = REFUSED_KEYS[key]
    with pytest.raises(ConfigError, match=rf"^{key}=") as error:
        options(**{key: value})
    assert message in str(error.value)


def refusals(stage: int, **changes: tuple[str, str]) -> list[str]:
    """The messages about settings that do not go with DeepSpeed's ``stage``."""
    plain = {
        "optimizer": ("optimizer", "adamw"), "clipping": ("clipping", "norm"), "precision": ("precision", "fp32"),
        "lora": ("lora", "none"), "activation_checkpointing": ("activation_checkpointing", "full"),
    }  # fmt: skip
    parts = {key: option(*names) for key, names in (plain | changes).items()}
    return list(problems(ParallelSettings(2, True, cuda_graphs=False, zero_stage=stage, **parts)))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_elementwise_options_go_with_every_stage(stage: int) -> None:
    for optimizer in ("adamw", "adam", "sgd", "lion", "adamw_bf16"):
        for clipping in ("norm", "value", "per_parameter", "none"):
            assert not refusals(stage, optimizer=("optimizer", optimizer), clipping=("clipping", clipping))


REFUSED_OPTIONS = {
    ("optimizer", "muon"): "take optimizer=adamw, or distributed=fsdp",
    ("optimizer", "adafactor"): "take optimizer=adamw_bf16",
    ("optimizer", "adamw_8bit"): "take optimizer=adamw_bf16",
    ("clipping", "adaptive"): "take clipping=norm",
    ("precision", "fp8"): "take precision=bf16",
}


@pytest.mark.parametrize("names", REFUSED_OPTIONS, ids="=".join)
def test_options_that_need_whole_parameters_name_what_does_not(names: tuple[str, str]) -> None:
    (message,) = refusals(1, **{names[0]: names})
    assert message.startswith("=".join(names))
    assert REFUSED_OPTIONS[names] in message


def test_packed_and_compiled_weights_stay_whole() -> None:
    lora = make_option("lora", "lora", {}, quantization="nf4")
    plain = ParallelSettings(
        2, True, option("optimizer", "adamw"), option("clipping", "norm"), option("precision", "fp32"), lora,
        option("activation_checkpointing", "none"), False, zero_stage=2, compile=True,
    )  # fmt: skip
    assert not list(problems(plain))
    compiled, packed = problems(replace(plain, zero_stage=3))
    assert "take lora.quantization=none, or distributed.zero_stage=2" in packed
    assert compiled.startswith("runtime.compile=true: ZeRO 3 gathers weights module by module")


def test_one_process_is_told_to_take_none() -> None:
    with pytest.raises(ValueError, match="take distributed=none"):
        options().mesh(1)


# --- the file -------------------------------------------------------------------------------------------------------


def test_content_of_the_file_is_kept_in_its_place(tmp_path: Path) -> None:
    path = tmp_path / "ds, config (1).json"
    path.write_text(json.dumps(BAICHUAN, indent=2))
    words = ("model=llama_tiny", "tokenizer=byte", "distributed=deepspeed", f"distributed.config={path}")
    run = Run.compose(*words)
    path.unlink()
    stored = yaml.safe_load(stored_config.dump(run))
    assert json.loads(stored["distributed"]["config"]) == BAICHUAN
    assert Run.from_config(stored).distributed == run.distributed
    with pytest.raises(ConfigError, match=r"^distributed\.config=.*: no such file"):
        Run.compose(*words)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{bad", "not JSON (Expecting property name"),
        ('{"a": 1, "a": 2}', "not JSON ('a' occurs twice)"),
        ("[1]", "not the JSON of DeepSpeed, an object of its keys"),
        ("", "not JSON ("),
    ],
)
def test_a_file_that_is_no_json_object_is_one_message(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "ds.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"^config=") as error:
        read_config(str(path))
    assert str(error.value).startswith(f"config={path}: ")
    assert message in str(error.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^config=nothing\.json: no such file in "):
        read_config("nothing.json")
    with pytest.raises(ValueError, match="a folder"):
        read_config(str(tmp_path))


# --- the package ----------------------------------------------------------------------------------------------------


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepspeed.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'llmtrain\[deepspeed\]', or take distributed=fsdp"):
        check_installed()


def test_another_version_is_refused() -> None:
    check_version(VERSION)
    with pytest.raises(ValueError, match=rf"works with deepspeed {VERSION}, 0\.1\.0 is installed"):
        check_version("0.1.0")
