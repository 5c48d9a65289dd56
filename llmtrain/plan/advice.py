"""Suggestions for a run that does not fit: overrides, the cheapest first, each with an estimate."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmtrain.base.options import option_name
from llmtrain.config.build import build
from llmtrain.config.compose import compose
from llmtrain.config.folders import conf_dir
from llmtrain.plan.blueprint import Blueprint
from llmtrain.plan.memory import Memory, Phase, TraceError, at_micro_batch, estimate

MAX_SUGGESTIONS = 3
MAX_TRIALS = 8  # combinations, each two or three traces

# Time of a step under an option, relative to the time without it.
SLOWER = {
    "activation_checkpointing=selective": 1.06,  # norms, activations and casts are repeated
    "activation_checkpointing=full": 1.33,  # the forward pass is repeated: 4/3
    "optimizer=adamw_8bit": 1.02,
    "optimizer=adafactor": 1.05,
    "lora=lora": 0.75,  # no gradients of the frozen weights
}
PER_HALVING = 1.02  # of the micro-batch: smaller matrix products, more launches
BF16_TIME = 0.5  # time of a step, relative to fp32 and tf32 on a GPU
CHANGES_TRAINING = ("optimizer=adafactor", "lora=lora")  # suggested last


@dataclass(frozen=True)
class Suggestion:
    """Overrides under which the run fits."""

    overrides: tuple[str, ...]
    memory: Memory
    slower: float  # time of a step, relative to the present one

    @property
    def changes_training(self) -> bool:
        """Return whether training changes, and not only its memory."""
        return changes_training(self.overrides)


def suggest(
    blueprint: Blueprint, present: Memory, *, gpu: bool, available: int, copied: bool, bf16: bool
) -> list[Suggestion]:
    """Find a few combinations of overrides that fit into ``available`` bytes, each with the largest micro-batch.

    ``present`` is the memory without overrides.  ``copied``: a save copies weights and state in host memory.  ``bf16``:
    the device has it and the run does not use it.
    """
    options = Options.known()
    found: list[Suggestion] = []
    tried = 0
    least: dict[tuple[str, ...], int] = {(): floor(present)}  # bytes, by the overrides of weights and state
    for overrides, slower in sorted(
        combinations(blueprint, options, bf16), key=lambda pair: (changes_training(pair[0]), pair[1])
    ):
        kind = tuple(key for key in overrides if key.startswith(("optimizer=", "lora=")))
        if len(found) == MAX_SUGGESTIONS or tried == MAX_TRIALS:
            break
        if least.get(kind, 0) > available:
            continue
        tried += 1
        try:
            changed = options.apply(blueprint, overrides)
            smallest = estimate(at_micro_batch(changed, 1), gpu=gpu, copied=copied)
            least[kind] = floor(smallest)
            if smallest.needed > available:
                continue
            size, memory = largest_fitting(changed, smallest, None if overrides else present, available, gpu, copied)
        except (TraceError, ValueError):  # not for this model or device
            continue
        if size == blueprint.micro_batch_size and not overrides:  # nothing has changed
            continue
        halvings = math.log2(blueprint.micro_batch_size / size)
        micro = () if size == blueprint.micro_batch_size else (f"accumulation.micro_batch_size={size}",)
        found.append(Suggestion((*micro, *overrides), memory, slower * PER_HALVING**halvings))
    return sorted(found, key=lambda suggestion: (suggestion.changes_training, suggestion.slower))


def floor(memory: Memory) -> int:
    """Return the bytes that no micro-batch or recomputation saves: the optimizer's step, libraries and copies."""
    other = sum(memory.parts.get(key, 0) for key in ("libraries", "checkpoint copy"))
    return memory.by_phase[Phase.update] + other


def largest_fitting(
    blueprint: Blueprint, smallest: Memory, largest: Memory | None, available: int, gpu: bool, copied: bool
) -> tuple[int, Memory]:
    """Halve the micro-batch until it fits; ``smallest``: memory at 1, ``largest``: memory of the present size."""
    size = blueprint.micro_batch_size
    largest = largest or (smallest if size == 1 else estimate(blueprint, gpu=gpu, copied=copied))
    if largest.needed <= available:
        return size, largest
    per_sequence = (largest.needed - smallest.needed) / (size - 1)
    while (size := (size + 1) // 2) > 1:
        if smallest.needed + per_sequence * (size - 1) > available:  # saves a trace
            continue
        memory = estimate(at_micro_batch(blueprint, size), gpu=gpu, copied=copied)
        if memory.needed <= available:
            return size, memory
    return 1, smallest


def changes_training(overrides: Sequence[str]) -> bool:
    """Return whether ``overrides`` change training, and not only its memory."""
    return any(override in CHANGES_TRAINING for override in overrides)


def combinations(blueprint: Blueprint, options: "Options", bf16: bool) -> Iterator[tuple[tuple[str, ...], float]]:
    """Yield overrides other than the micro-batch, and the relative time of a step; the first has none."""
    settings = blueprint.settings
    present = {f"{group}={option_name(component)}" for group, component in (
        ("optimizer", settings.optimizer), ("lora", settings.lora),
        ("activation_checkpointing", blueprint.checkpointing),
    )}  # fmt: skip
    possible = [key for key in SLOWER if key in options.nodes and key not in present]
    if option_name(settings.optimizer) not in ("adam", "adamw"):  # replacing another optimizer would change training
        possible = [key for key in possible if not key.startswith("optimizer=")]
    if "activation_checkpointing=full" in present:  # nothing keeps less
        possible = [key for key in possible if not key.startswith("activation_checkpointing=")]
    keeps = [(), *((key,) for key in possible if key.startswith("activation_checkpointing="))]
    states = [(), *((key,) for key in possible if not key.startswith("activation_checkpointing="))]
    for precision in [(), ("precision=bf16",)] if bf16 else [()]:
        for state in states:
            for keep in keeps:
                factor = BF16_TIME if precision else 1.0
                for key in (*keep, *state):
                    factor *= SLOWER[key]
                yield (*precision, *keep, *state), factor


@dataclass(frozen=True)
class Options:
    """The options of ``conf/`` that save memory."""

    nodes: Mapping[str, Any]  # "group=option" -> node

    @classmethod
    def known(cls) -> "Options":
        """Compose the options that this installation has."""
        wanted = ["precision=bf16", *SLOWER]
        nodes: dict[str, Any] = {}
        there = [key for key in wanted if (conf_dir() / f"{key.replace('=', '/')}.yaml").is_file()]
        while there:  # one option of each group at a time
            batch = list({key.split("=")[0]: key for key in there}.values())
            composed = compose("train", batch)
            nodes |= {key: composed[key.split("=")[0]] for key in batch}
            there = [key for key in there if key not in batch]
        return cls(nodes)

    def apply(self, blueprint: Blueprint, overrides: Sequence[str]) -> Blueprint:
        """Apply ``overrides`` to a blueprint."""
        changes: dict[str, Any] = {}
        micro = blueprint.micro_batch
        precision = blueprint.precision
        for override in overrides:
            key, _, value = override.partition("=")
            if key == "accumulation.micro_batch_size":
                micro = int(value)
                continue
            before = getattr(blueprint.settings, key)
            base = next(c for c in type(before).__mro__ if c.__module__ == f"llmtrain.{key}")
            component: Any = build(self.nodes[override], base, path=key)
            if key == "precision":
                precision = component.build(precision.device)
            changes[key] = component
        settings: Any = blueprint.settings
        if changes:
            settings = dataclasses.replace(settings, **changes)
        return dataclasses.replace(blueprint, settings=settings, micro_batch=micro, precision=precision)
