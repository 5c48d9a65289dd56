"""The keys of DeepSpeed's JSON that a run has too: they say the same, or "auto"."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from llmtrain.accumulation import Accumulation
from llmtrain.base.options import option_name
from llmtrain.clipping import Clipping
from llmtrain.distributed.deepspeed_json import AUTO
from llmtrain.optimizer import OptimizerConfig
from llmtrain.precision import PrecisionConfig
from llmtrain.schedule import Schedule

OPTIMIZERS = {"adamw": "adamw", "adam": "adamw", "lion": "lion", "sgd": "sgd", "muon": "muon"}  # by DeepSpeed's names
SCHEDULES = {"WarmupLR": "constant", "WarmupDecayLR": "warmup_linear", "WarmupCosineLR": "warmup_cosine"}
ONLY_THEIRS: dict[str, tuple[Any, ...]] = {  # values, by key, that say what is done here; no other can be had
    "bf16.immediate_grad_update": (False, True), "bf16.check_grad_overflow": (True,),
    "bf16.bf16_master_weights_and_grads": (False,), "bf16.bf16_optimizer_states": (False,),
    "fp16.auto_cast": (False,), "fp16.loss_scale": (0,), "fp16.hysteresis": (1,),
    "fp16.consecutive_hysteresis": (False, True), "fp16.min_loss_scale": (0,),
    "fp16.fp16_master_weights_and_grads": (False,),
    "data_types.grad_accum_dtype": ("fp32", "float32", "float"), "data_types.param_dtype": ("fp32", "float32", "float"),
    "optimizer.params.bias_correction": (True,), "scheduler.params.warmup_type": ("linear",),
}  # fmt: skip


@dataclass(frozen=True)
class RunValues:
    """The values of a run that a JSON may repeat."""

    processes: int
    accumulation: Accumulation
    clipping: Clipping
    optimizer: OptimizerConfig
    schedule: Schedule
    precision: PrecisionConfig
    log_every: int
    max_steps: int | None


@dataclass(frozen=True)
class Value:
    """A value of the run, the setting that gives it, and what to set for another one; ``{}`` stands for that."""

    own: Any
    setting: str
    remedy: str

    @classmethod
    def of(cls, key: str, own: Any) -> "Value":
        """The value of ``key``."""
        return cls(own, f"{key}={_shown(own)}", f"{key}={{}}")

    def problem(self, path: str, given: Any) -> str:
        """The message about another value in the JSON."""
        return (
            f"distributed.config: {path}={_shown(given)}, and {self.setting} here; take "
            f'{self.remedy.format(_shown(given))}, or "auto" in the JSON'
        )


def check_agreement(given: Mapping[str, Any], run: RunValues) -> None:
    """Raise ValueError for the first key of the JSON ``given`` that contradicts ``run``, with both values."""
    for problem in contradictions(given, run):
        raise ValueError(problem)


def contradictions(given: Mapping[str, Any], run: RunValues) -> Iterator[str]:
    """Yield a message for each key of the JSON that contradicts the run."""
    own = run_values(given, run)
    for path, value in _values(given):
        if path in own:
            if not _is_same(value, own[path].own):
                yield own[path].problem(path, value)
        elif path in ONLY_THEIRS and value not in ONLY_THEIRS[path] and _is_used(path, run):
            allowed = " or ".join(_shown(each) for each in ONLY_THEIRS[path])
            yield (
                f"distributed.config: {path}={_shown(value)}: training here is as with {allowed}; take that, or "
                '"auto" in the JSON'
            )


def run_values(given: Mapping[str, Any], run: RunValues) -> dict[str, Value]:
    """The values of ``run`` by the paths of the JSON's keys."""
    return {
        **_batch_values(run), **_clipping_values(run), **_precision_values(run), **_optimizer_values(given, run),
        **_schedule_values(run),
        "steps_per_print": Value.of("metrics.log_every", run.log_every),
    }  # fmt: skip


def passes(run: RunValues) -> tuple[int, int]:
    """Sequences of a rank's largest micro-batch, and its micro-batches, in the run's first step."""
    of_rank = math.ceil(run.accumulation.batch_size_at(0, 0) / run.processes)
    micro = min(run.accumulation.micro_batch_size, of_rank)
    return micro, math.ceil(of_rank / micro)


def _batch_values(run: RunValues) -> dict[str, Value]:
    micro, count = passes(run)
    name, size = option_name(run.accumulation), "accumulation.micro_batch_size"
    if (batch := getattr(run.accumulation, "batch_size", None)) is None:
        whole = Value(name, f"accumulation={name}", "accumulation=fixed accumulation.batch_size={}")
    else:
        whole = Value.of("accumulation.batch_size", batch)
    if run.accumulation.is_probed:
        probed = Value(name, f"accumulation={name}", f"accumulation=fixed {size}={{}}")
        return {"train_batch_size": whole, "train_micro_batch_size_per_gpu": probed}
    setting = f"{size}={run.accumulation.micro_batch_size} on {run.processes} processes makes {{}}"
    other = f"another {size} or accumulation.batch_size, for {{}}"
    return {
        "train_batch_size": whole,
        "train_micro_batch_size_per_gpu": Value(micro, setting.format(micro), f"{size}={{}}"),
        "gradient_accumulation_steps": Value(count, setting.format(count), other),
    }


def _clipping_values(run: RunValues) -> dict[str, Value]:
    name, limit = option_name(run.clipping), getattr(run.clipping, "max_norm", None)
    if name == "norm":
        return {"gradient_clipping": Value.of("clipping.max_norm", limit)}
    own = 0 if name == "none" else name
    return {"gradient_clipping": Value(own, f"clipping={name}", "clipping=norm clipping.max_norm={}")}


def _precision_values(run: RunValues) -> dict[str, Value]:
    name, found = option_name(run.precision), {}
    for section in ("bf16", "bfloat16", "fp16"):
        wanted = section.replace("bfloat", "bf")
        own = name if name == "auto" else name == wanted
        found[f"{section}.enabled"] = Value(own, f"precision={name}", f"precision={wanted} for true, another for false")
    scale, interval = (getattr(run.precision, key, None) for key in ("initial_scale", "growth_interval"))
    if scale is not None:
        remedy = "precision.initial_scale, 2 to the power of {}"
        found["fp16.initial_scale_power"] = Value(math.log2(scale), f"precision.initial_scale={scale:g}", remedy)
        found["fp16.loss_scale_window"] = Value.of("precision.growth_interval", interval)
    return found


def _optimizer_values(given: Mapping[str, Any], run: RunValues) -> dict[str, Value]:
    name, found = option_name(run.optimizer), {}
    section = given.get("optimizer") or {}
    kind, params = section.get("type"), section.get("params")
    if kind not in (AUTO, None):
        theirs = OPTIMIZERS.get(kind.lower())
        if isinstance(params, Mapping) and kind.lower() == "adam" and params.get("adam_w_mode") is False:
            theirs = "adam"
        remedy = f"optimizer={theirs}" if theirs else "an optimizer that there is here, as optimizer=adamw"
        found["optimizer.type"] = Value(kind if theirs == name else name, f"optimizer={name}", remedy)
    for key in ("lr", "betas", "eps", "weight_decay", "momentum", "nesterov"):
        path = f"optimizer.params.{key}"
        if hasattr(run.optimizer, key):
            found[path] = Value.of(f"optimizer.{key}", getattr(run.optimizer, key))
        else:
            found[path] = Value(name, f"optimizer={name} has none", f"an optimizer that has {key}")
    return found


def _schedule_values(run: RunValues) -> dict[str, Value]:
    name, total = option_name(run.schedule), run.max_steps
    theirs = {ours: kind for kind, ours in SCHEDULES.items()}.get(name, name)
    options = ", ".join(f"schedule={ours} for {kind}" for kind, ours in SCHEDULES.items())
    warmup = getattr(run.schedule, "warmup_steps", None) if total is None else run.schedule.warmup(total)
    ratio = Value("rates", f"schedule={name} has rates", "schedule.initial_lr and schedule.min_lr")
    first = getattr(run.schedule, "initial_lr", None)
    return {
        "scheduler.type": Value(theirs, f"schedule={name}", options),
        "scheduler.params.warmup_max_lr": Value.of("optimizer.lr", run.optimizer.lr),
        "scheduler.params.warmup_min_lr": Value.of("schedule.initial_lr", first),
        "scheduler.params.warmup_num_steps": Value.of("schedule.warmup_steps", warmup),
        "scheduler.params.total_num_steps": Value.of("loop.max_steps", total),
        "scheduler.params.warmup_min_ratio": ratio,
        "scheduler.params.cos_min_ratio": ratio,
    }


def _is_used(path: str, run: RunValues) -> bool:
    """True unless the key is of a section that another precision than the run's would use."""
    section = path.partition(".")[0]
    return section not in ("fp16", "bf16") or option_name(run.precision) in (section, "auto")


def _values(given: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """The paths and values of a JSON, without those that leave the choice to the run."""
    for key, value in given.items():
        if isinstance(value, Mapping):
            yield from _values(value, f"{path}{key}.")
        elif value not in (AUTO, None):
            yield f"{path}{key}", value


def _is_same(theirs: Any, own: Any) -> bool:
    if isinstance(theirs, list) and isinstance(own, list | tuple):
        return len(theirs) == len(own) and all(map(_is_same, theirs, own))
    if isinstance(theirs, bool) or isinstance(own, bool) or not isinstance(own, int | float):
        return type(theirs) is type(own) and theirs == own
    return isinstance(theirs, int | float) and math.isclose(theirs, own, rel_tol=1e-9)


def _shown(value: Any) -> str:
    return json.dumps(list(value) if isinstance(value, tuple) else value)
