"""Overrides that make a run fit, the cheapest first, each estimated anew."""

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
from llmtrain.plan.memory import Memory, Phase, Untraceable, at_micro_batch, estimate

WANTED = 3  # suggestions
MOST_TRIED = 8  # combinations, each two or three traces

# What an option makes a step take, as a multiple.
SLOWER = {
    "activation_checkpointing=selective": 1.06,  # norms, activations and casts again
    "activation_checkpointing=full": 1.33,  # the forward pass again: 4/3
    "optimizer=adamw_8bit": 1.02,
    "optimizer=adafactor": 1.05,
    "lora=lora": 0.75,  # no gradients of the frozen weights
}
PER_HALVING = 1.02  # of the micro-batch: smaller matrix products, more launches
BF16_TIME = 0.5  # of a step's, against fp32 and tf32 on a GPU
CHANGES_TRAINING = ("optimizer=adafactor", "lora=lora")  # they come last


@dataclass(frozen=True)
class Suggestion:
    """Overrides under which the run fits."""

    overrides: tuple[str, ...]
    memory: Memory
    slower: float  # a step takes so many times as long

    @property
    def changes_training(self) -> bool:
        """Whether it trains otherwise, and not just in less memory."""
        return is_other(self.overrides)


def suggest(
    blueprint: Blueprint, present: Memory, *, gpu: bool, available: int, copied: bool, bf16: bool
) -> list[Suggestion]:
    """The first few combinations of overrides that fit into ``available`` bytes, each with the largest micro-batch.

    ``present``: without any.  ``copied``: whether a save copies weights and state in host memory.  ``bf16``: whether
    the device has it and the run does not use it.
    """
    options = Options.known()
    found: list[Suggestion] = []
    tried = 0
    least: dict[tuple[str, ...], int] = {
        (): floor(present)
    }  # by what changes weights and state: what no micro-batch goes below
    for overrides, slower in sorted(
        combinations(blueprint, options, bf16), key=lambda pair: (is_other(pair[0]), pair[1])
    ):
        kind = tuple(key for key in overrides if key.startswith(("optimizer=", "lora=")))
        if len(found) == WANTED or tried == MOST_TRIED:
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
        except (Untraceable, ValueError):  # this model, or this device, cannot have it
            continue
        if size == blueprint.micro_batch_size and not overrides:  # nothing has changed
            continue
        halvings = math.log2(blueprint.micro_batch_size / size)
        micro = () if size == blueprint.micro_batch_size else (f"accumulation.micro_batch_size={size}",)
        found.append(Suggestion((*micro, *overrides), memory, slower * PER_HALVING**halvings))
    return sorted(found, key=lambda suggestion: (suggestion.changes_training, suggestion.slower))


def floor(memory: Memory) -> int:
    """What no micro-batch and no recomputation goes below: the optimizer's step, and what is not the step's."""
    other = sum(memory.parts.get(key, 0) for key in ("libraries", "checkpoint copy"))
    return memory.by_phase[Phase.update] + other


def largest_fitting(
    blueprint: Blueprint, smallest: Memory, largest: Memory | None, available: int, gpu: bool, copied: bool
) -> tuple[int, Memory]:
    """The largest of ever halved micro-batches that fits; ``smallest``: memory at 1, ``largest``: undivided."""
    size = blueprint.micro_batch_size
    largest = largest or (smallest if size == 1 else estimate(blueprint, gpu=gpu, copied=copied))
    if largest.needed <= available:
        return size, largest
    per_sequence = (largest.needed - smallest.needed) / (size - 1)
    while (size := (size + 1) // 2) > 1:
        if smallest.needed + per_sequence * (size - 1) > available:  # spares a trace
            continue
        memory = estimate(at_micro_batch(blueprint, size), gpu=gpu, copied=copied)
        if memory.needed <= available:
            return size, memory
    return 1, smallest


def is_other(overrides: Sequence[str]) -> bool:
    """Whether a run under ``overrides`` learns otherwise."""
    return any(override in CHANGES_TRAINING for override in overrides)


def combinations(blueprint: Blueprint, options: "Options", bf16: bool) -> Iterator[tuple[tuple[str, ...], float]]:
    """Overrides beside the micro-batch, and what they make a step take; first none at all."""
    settings = blueprint.settings
    present = {f"{group}={option_name(component)}" for group, component in (
        ("optimizer", settings.optimizer), ("lora", settings.lora),
        ("activation_checkpointing", blueprint.checkpointing),
    )}  # fmt: skip
    possible = [key for key in SLOWER if key in options.nodes and key not in present]
    if option_name(settings.optimizer) not in ("adam", "adamw"):  # another kind of optimizer is another training
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
    """The options that there are, as components."""

    nodes: Mapping[str, Any]  # "group=option" -> node

    @classmethod
    def known(cls) -> "Options":
        """What conf/ has of the options that save memory."""
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
        """The blueprint under ``overrides``."""
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
