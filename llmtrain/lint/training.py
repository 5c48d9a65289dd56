"""Checks of the trained parameters, the arithmetic, and the work that a kill would lose."""

from collections.abc import Iterator

from llmtrain.base.device import has_native_bf16
from llmtrain.base.format import counted
from llmtrain.base.options import option_name
from llmtrain.config.build import naming
from llmtrain.lint.case import Case, Finding, error, warning
from llmtrain.lora.low_rank import LowRankAdaptation
from llmtrain.lora.merge import adapters
from llmtrain.optimizer.groups import GroupedOptimizer
from llmtrain.precision.bf16 import BF16
from llmtrain.precision.fp8 import FP8
from llmtrain.precision.fp16 import FP16

LAPTOP = 50_000_000  # the most parameters that a CPU trains in minutes
FP8_PAYS_FROM = 800_000_000  # parameters
LONG_RUN = 1000  # steps from which on a run should write checkpoints before its end


def nothing_trainable(case: Case) -> Iterator[Finding]:
    """Parameters that are frozen, or that no learning rate moves."""
    trainable = dict(case.unit.trained_weights())
    if not trainable:
        lora = option_name(case.run.lora)
        yield error("lora", f"lora={lora}: every parameter of the model is frozen, nothing would be learnt; lora=none")
        return
    optimizer = case.run.optimizer
    with naming("optimizer"):
        members = optimizer.members(case.unit) if isinstance(optimizer, GroupedOptimizer) else None
    if members is not None and not any(member.lr_multiplier for member in members):
        yield error(
            "optimizer.rules",
            "optimizer.rules: they multiply the learning rate of every parameter by 0, nothing would be learnt; "
            "optimizer.rules=[], or a pattern that leaves some parameters out",
        )
    if case.optimizer is not None:
        groups = case.optimizer.param_groups
        moved = {name for group in groups for name, _ in zip(group["names"], group["params"], strict=False)}
        # by name: a rank trains its parts of parameters, and those on meta are other ranks' alone
        left = [name for name, p in trainable.items() if name not in moved and not p.is_meta]
        if left:
            name = option_name(optimizer)
            yield warning(
                "optimizer",
                f"optimizer={name}: {len(left)} of {len(trainable)} parameters are in none of its groups and "
                f"keep their values: {', '.join(left[:3])}{', …' * (len(left) > 3)}; give them one, or freeze them",
            )


def oversized_adapters(case: Case) -> Iterator[Finding]:
    """A rank so high that adapters are no smaller than their matrices."""
    lora = case.run.lora
    if not isinstance(lora, LowRankAdaptation):
        return
    with_adapter = adapters(case.unit.model)
    sizes = {name: module.adapter_sizes() for name, module in with_adapter.items()}
    wide = [name for name, (inputs, outputs) in sizes.items() if lora.rank * (inputs + outputs) >= inputs * outputs]
    if wide:
        half = min(inputs * outputs // (2 * (inputs + outputs)) for inputs, outputs in sizes.values())
        yield warning(
            "lora.rank",
            f"lora.rank={lora.rank}: {len(wide)} of {len(sizes)} adapters have as many parameters as the matrix that "
            f"they change, or more: {', '.join(wide[:3])}{', …' * (len(wide) > 3)}; lora.rank={max(half, 1)}",
        )


def clipping_too_late(case: Case) -> Iterator[Finding]:
    """Clipping that begins when the run has ended."""
    start = case.run.clipping.start_step
    if start >= case.max_steps:
        yield warning(
            "clipping.start_step",
            f"clipping.start_step={start}: the run ends after {counted(case.max_steps, 'step')}, so that no gradient "
            "is ever clipped; clipping.start_step=0, or clipping=none if that is meant",
        )


def slow_arithmetic(case: Case) -> Iterator[Finding]:
    """A precision that the device only emulates, or that brings it nothing."""
    precision, device = case.run.precision, case.device
    if device is None:
        return
    if isinstance(precision, BF16) and not has_native_bf16(device):
        name, remedy = (device.type, "auto") if device.type == "cpu" else ("GPU", "fp16")
        yield warning(
            "precision",
            f"precision=bf16: this {name} does not compute in bf16 but emulates it, which is slower than fp32 "
            f"and less exact; precision={remedy}",
        )
    elif isinstance(precision, FP8):
        yield from _slow_fp8(case)
    elif isinstance(precision, FP16) and device.type == "cpu":
        yield warning(
            "precision",
            "precision=fp16: made for GPUs that have no bf16; on a CPU precision=auto is as fast, and does not lose "
            "steps to fp16's narrow range; precision=auto",
        )


def _slow_fp8(case: Case) -> Iterator[Finding]:
    """8-bit products whose gain is less than the work of rounding to 8 bits."""
    parameters = case.unit.model.num_parameters()
    if case.run.runtime.compile is False:
        yield warning(
            "runtime.compile",
            "runtime.compile=false: with precision=fp8 every rounding to 8 bits is some ten kernels of its own, which "
            "take longer than the products save; runtime.compile=true, or precision=bf16",
        )
    elif parameters < FP8_PAYS_FROM:
        yield warning(
            "precision",
            f"precision=fp8: the model has {parameters / 1e6:.0f} million parameters, and the products of less than "
            "about 1 billion save no more time than rounding to 8 bits takes; precision=bf16",
        )


def default_on_cpu(case: Case) -> Iterator[Finding]:
    """The default model, chosen by nobody, where it takes hours: a first try is over sooner with the laptop's."""
    device, parameters = case.device, case.unit.model.num_parameters()
    chosen = {"model", "experiment"} & case.given.keys() or case.is_resumed or case.run.plugins
    if device is not None and device.type == "cpu" and parameters > LAPTOP and not chosen:
        yield warning(
            "model",
            f"model: none was chosen, and the default's {parameters / 1e6:.0f} million parameters are for a GPU; on a "
            "CPU experiment=laptop takes a minute or two; to train the default anyway: model=gpt124m",
        )


def lost_work(case: Case) -> Iterator[Finding]:
    """A long run without a checkpoint before its end."""
    checkpoint, loop = case.run.checkpoint, case.run.loop
    intervals = [checkpoint.every_steps]
    if checkpoint.before_evaluation:
        intervals += [loop.eval_every * case.evaluates, loop.sample_every]
    saves = any(0 < interval < case.max_steps for interval in intervals) or checkpoint.every_minutes
    if case.max_steps >= LONG_RUN and not saves:
        yield warning(
            "checkpoint.every_steps",
            f"checkpoint.every_steps={checkpoint.every_steps}: the only checkpoint is the last, and a kill or a "
            f"crash loses up to {case.max_steps:,} steps; checkpoint.every_steps={case.max_steps // 20}, or "
            "checkpoint.every_minutes=15",
        )
