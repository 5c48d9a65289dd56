"""The keys of DeepSpeed's JSON: DeepSpeed alone decides some, a run has others too, and the rest is refused.

They are those of DeepSpeed 0.19 (deepspeed/runtime/config.py and runtime/zero/config.py).
"""

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from llmtrain.base.checks import did_you_mean

AUTO = "auto"  # DeepSpeed's users write it for a value that the program has; for its own keys: the default


class Kind(NamedTuple):
    """The values that a key takes."""

    words: str
    holds: Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


FLAG = Kind("true or false", lambda value: isinstance(value, bool))
NUMBER = Kind("a number", _is_number)
COUNT = Kind("a whole number from 0 on", lambda value: _is_number(value) and value >= 0 and value == int(value))
DEPTH = Kind("a whole number from -1 on", lambda value: _is_number(value) and value >= -1 and value == int(value))
TEXT = Kind("a text", lambda value: isinstance(value, str))
TEXTS = Kind("a list of texts", lambda value: isinstance(value, list) and all(isinstance(each, str) for each in value))
STAGE = Kind("1, 2 or 3 (distributed=ddp for 0)", lambda value: type(value) is int and value in (1, 2, 3))
DTYPE = Kind("fp32, bf16 or fp16", lambda value: value in ("fp32", "bf16", "bfp16", "fp16"))
ANY = Kind("", lambda value: True)
PRINTED = Kind(
    "null: what DeepSpeed reports is printed, since a stored run does not decide where to write", lambda _: False
)
SECTION = Kind("an object", lambda value: isinstance(value, dict))

Keys = Mapping[str, "Kind | Keys"]

ZERO: Keys = {
    "stage": STAGE, "contiguous_gradients": FLAG, "reduce_scatter": FLAG, "reduce_bucket_size": COUNT,
    "use_multi_rank_bucket_allreduce": FLAG, "allgather_partitions": FLAG, "allgather_bucket_size": COUNT,
    "overlap_comm": FLAG, "load_from_fp32_weights": FLAG, "sub_group_size": COUNT, "prefetch_bucket_size": COUNT,
    "stage3_prefetch_bucket_size": COUNT, "param_persistence_threshold": COUNT,
    "stage3_param_persistence_threshold": COUNT, "model_persistence_threshold": COUNT,
    "stage3_model_persistence_threshold": COUNT, "max_live_parameters": COUNT, "stage3_max_live_parameters": COUNT,
    "max_reuse_distance": COUNT, "stage3_max_reuse_distance": COUNT, "gather_16bit_weights_on_model_save": FLAG,
    "stage3_gather_16bit_weights_on_model_save": FLAG, "stage3_gather_fp16_weights_on_model_save": FLAG,
    "module_granularity_threshold": COUNT, "stage3_module_granularity_threshold": COUNT,
    "use_all_reduce_for_fetch_params": FLAG, "stage3_use_all_reduce_for_fetch_params": FLAG,
    "allgather_sequential": FLAG, "stage3_allgather_sequential": FLAG, "ignore_unused_parameters": FLAG,
    "parameter_alignment": FLAG, "memory_efficient_linear": FLAG, "override_module_apply": FLAG,
    "log_trace_cache_warnings": FLAG, "enable_sanity_checks": FLAG, "leaf_module": SECTION,
}  # fmt: skip
TAKEN: Keys = {  # DeepSpeed alone has them
    "zero_optimization": ZERO, "zero_allow_untested_optimizer": FLAG, "zero_force_ds_cpu_optimizer": FLAG,
    "communication_data_type": DTYPE, "wall_clock_breakdown": FLAG, "memory_breakdown": FLAG, "dump_state": FLAG,
    "disable_python_gc": FLAG, "log_level": TEXT,
    "comms_logger": {"enabled": FLAG, "verbose": FLAG, "prof_all": FLAG, "debug": FLAG, "prof_ops": TEXTS},
    "flops_profiler": {
        "enabled": FLAG, "profile_step": COUNT, "module_depth": DEPTH, "top_modules": COUNT, "detailed": FLAG,
        "output_file": PRINTED, "recompute_fwd_factor": NUMBER,
    },
}  # fmt: skip
OPTIMIZER_PARAMS: Keys = {
    "lr": NUMBER, "betas": ANY, "eps": NUMBER, "weight_decay": NUMBER, "momentum": NUMBER, "nesterov": FLAG,
    "torch_adam": FLAG, "adam_w_mode": FLAG, "bias_correction": FLAG,
}  # fmt: skip
SCHEDULER_PARAMS: Keys = {
    "warmup_min_lr": NUMBER, "warmup_max_lr": NUMBER, "warmup_num_steps": COUNT, "total_num_steps": COUNT,
    "warmup_type": TEXT, "warmup_min_ratio": NUMBER, "cos_min_ratio": NUMBER,
}  # fmt: skip
FP16: Keys = {
    "enabled": FLAG, "auto_cast": FLAG, "loss_scale": NUMBER, "initial_scale_power": COUNT, "loss_scale_window": COUNT,
    "hysteresis": COUNT, "consecutive_hysteresis": FLAG, "min_loss_scale": NUMBER,
    "fp16_master_weights_and_grads": FLAG,
}  # fmt: skip
BF16: Keys = {
    "enabled": FLAG, "immediate_grad_update": FLAG, "check_grad_overflow": FLAG, "bf16_master_weights_and_grads": FLAG,
    "bf16_optimizer_states": FLAG,
}  # fmt: skip
SHARED: Keys = {  # a run has them too: see llmtrain.distributed.deepspeed_agreement
    "train_batch_size": COUNT, "train_micro_batch_size_per_gpu": COUNT, "gradient_accumulation_steps": COUNT,
    "gradient_clipping": NUMBER, "steps_per_print": COUNT, "bf16": BF16, "bfloat16": BF16, "fp16": FP16,
    "optimizer": {"type": TEXT, "params": OPTIMIZER_PARAMS}, "scheduler": {"type": TEXT, "params": SCHEDULER_PARAMS},
    "data_types": {"grad_accum_dtype": TEXT, "param_dtype": TEXT},
}  # fmt: skip

CHECKPOINTS = "checkpoints are of this program's format: checkpoint.every_steps and the other keys of that group"
UNDIVIDED = "sums of gradients are not scaled on the way; remove it"
REFUSED = {  # what to take in the place of what DeepSpeed would do
    "activation_checkpointing": "take activation_checkpointing=full or selective",
    "torch_autocast": "take precision=bf16 or fp16",
    "amp": "take precision=fp16",
    "tensorboard": "take metrics=tensorboard",
    "wandb": "take metrics=wandb",
    "csv_monitor": "metrics.jsonl of the run has the numbers",
    "comet": "take metrics=wandb, mlflow or tensorboard",
    "checkpoint": CHECKPOINTS,
    "load_universal_checkpoint": CHECKPOINTS,
    "use_node_local_storage": CHECKPOINTS,
    "nebula": CHECKPOINTS,
    "datastates_ckpt": CHECKPOINTS,
    "elasticity": "take distributed.restarts and distributed.min_processes",
    "autotuning": "take accumulation=auto with one process, or llmtrain plan",
    "data_efficiency": "the order of data is that of the group data",
    "curriculum_learning": "the order of data is that of the group data",
    "dataloader_drop_last": "take loop.whole_batches",
    "pipeline": "take distributed=pipeline",
    "tensor_parallel": "take distributed=tensor",
    "sequence_parallel_size": "take distributed=fsdp with distributed.context",
    "expert_parallel": "no model here has experts",
    "hybrid_engine": "samples are those of loop.sample_every",
    "compile": "take runtime.compile=true, with zero_stage=1 or 2",
    "aio": "nothing is moved to disks",
    "compression_training": "take lora.quantization for frozen weights",
    "weight_quantization": "take lora.quantization for frozen weights",
    "quantize_training": "take lora.quantization for frozen weights",
    "progressive_layer_drop": "there is no such training here",
    "eigenvalue": "there is no such training here",
    "sparse_attention": "there is no such model here",
    "sparse_gradients": "gradients of embeddings are dense here",
    "prescale_gradients": UNDIVIDED,
    "gradient_predivide_factor": UNDIVIDED,
    "gradient_allreduce_op": UNDIVIDED,
    "timers": "metrics.jsonl of the run has tokens per second",
    "disable_allgather": "weights are gathered after each update; remove it",
    "seq_parallel_communication_data_type": "no positions are divided here; remove it",
    "managed_gradient_accumulation": "accumulation is that of the group accumulation; remove it",
}
NO_OFFLOAD = "nothing is moved to the host or to disks; take zero_stage=3 over more GPUs, or lora=lora"
WHOLE_NUMBERS = (
    "exchanged weights and gradients are not rounded to 8 bits here; communication_data_type=bf16 halves them"
)
ZERO_REFUSED = {
    "offload_param": NO_OFFLOAD,
    "offload_optimizer": NO_OFFLOAD,
    "cpu_offload": NO_OFFLOAD,
    "cpu_offload_param": NO_OFFLOAD,
    "cpu_offload_use_pin_memory": NO_OFFLOAD,
    "zenflow": NO_OFFLOAD,
    "round_robin_gradients": "it is for gradients that move to the host, which none do here",
    "elastic_checkpoint": CHECKPOINTS,
    "pipeline_loading_checkpoint": CHECKPOINTS,
    "legacy_stage1": "DeepSpeed has given it up",
    "compute_grad_norm": "clipping and metrics need the norm; remove it",
    "zero_hpz_partition_size": "take distributed=hsdp",
    "mics_shard_size": "take distributed=hsdp",
    "mics_hierarchical_params_gather": "take distributed=hsdp",
    "zero_quantized_weights": WHOLE_NUMBERS,
    "zero_quantized_nontrainable_weights": WHOLE_NUMBERS,
    "zero_quantized_gradients": WHOLE_NUMBERS,
    "zeropp_loco_param": WHOLE_NUMBERS,
    "save_muon_momentum_buffer_in_memory": "optimizer=muon does not go with DeepSpeed",
}
NEUTRAL = {  # values of refused keys that ask for nothing, beside false, 0 and null
    "gradient_predivide_factor": 1, "gradient_allreduce_op": "mean", "managed_gradient_accumulation": True,
    "sequence_parallel_size": 1, "compute_grad_norm": True, "zero_hpz_partition_size": 1, "mics_shard_size": -1,
}  # fmt: skip


def check_keys(given: Mapping[str, Any]) -> None:
    """Raise ValueError for an unknown key, a value of another kind, and a key that is refused."""
    _check(given, {**TAKEN, **SHARED}, REFUSED, "")
    zero, logger = given.get("zero_optimization"), given.get("comms_logger")
    if isinstance(zero, Mapping):
        _check(zero, ZERO, ZERO_REFUSED, "zero_optimization.")
    if isinstance(logger, Mapping) and logger.get("enabled") is True and logger.get("verbose") is not True:
        raise ValueError(
            "config: comms_logger.enabled=true: shows nothing without comms_logger.verbose=true; give both"
        )


def _check(given: Mapping[str, Any], known: Keys, refused: Mapping[str, str], path: str) -> None:
    for key, value in given.items():
        if key in refused:
            if not _asks_nothing(value) and NEUTRAL.get(key) != value:
                raise ValueError(f"config: {path}{key}={_shown(value)}: does not go with a run here; {refused[key]}")
            continue
        kind = known.get(key)
        if kind is None:
            hint = did_you_mean(key, [*known, *refused]) or f"; there are: {', '.join(known)}"
            raise ValueError(f"config: {path}{key}: DeepSpeed has no such key{hint}")
        if value in (AUTO, None):
            continue
        if isinstance(kind, Kind):
            if not kind.holds(value):
                raise ValueError(f"config: {path}{key}={_shown(value)}: must be {kind.words}")
        elif not isinstance(value, Mapping):
            raise ValueError(f"config: {path}{key}={_shown(value)}: must be an object of {', '.join(kind)}")
        elif kind is not ZERO:
            _check(value, kind, {}, f"{path}{key}.")


def _asks_nothing(value: Any) -> bool:
    if isinstance(value, Mapping):
        is_off = value.get("enabled") in (False, AUTO) or value.get("device") in ("none", AUTO)
        return is_off or all(map(_asks_nothing, value.values()))
    return value is None or value is False or value == AUTO or (_is_number(value) and value == 0)


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def taken(given: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a checked JSON that DeepSpeed itself is given: what it alone decides, without "auto"."""
    found = {key: _without_auto(value) for key, value in given.items() if key in TAKEN and value not in (AUTO, None)}
    zero = found.get("zero_optimization", {})
    return found | {"zero_optimization": {key: value for key, value in zero.items() if key in ZERO}}


def _without_auto(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    return {key: _without_auto(each) for key, each in value.items() if each not in (AUTO, None)}
