"""The header and the summary of a run."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmtrain.base.device import PeakRate, device_name
from llmtrain.base.format import count, counted, rate, significant
from llmtrain.base.options import option_name
from llmtrain.config.assemble import Parts
from llmtrain.config.run_config import RunConfig
from llmtrain.data.chat.templates import describe
from llmtrain.lora import Lora
from llmtrain.lora.low_rank import LowRankAdaptation
from llmtrain.objective import TrainingUnit
from llmtrain.train.length import Place
from llmtrain.train.loop import Loop
from llmtrain.train.state import TrainState


def header(
    run: RunConfig,
    parts: Parts,
    path: Path,
    state: TrainState,
    peak: PeakRate,
    parent: Path | None = None,
    *,
    brief: bool = False,
) -> Iterator[tuple[str, str]]:
    """The rows at the start of a run: model, data, length, device.

    ``peak`` is the rate of 100% MFU, ``parent`` the run that this one branches from, if any; ``brief`` leaves out the
    sources of the validation text.
    """
    unit, corpus = parts.unit, parts.corpus
    model = unit.model
    sequence = run.data.sequence_length
    batch = parts.length.batch_size_at(state.step, state.tokens)
    micro = min(run.accumulation.micro_batch_size, batch)
    end = parts.length.place_from(Place(state.step, state.position, state.tokens))
    steps_left, tokens = end.step - state.step, end.tokens - state.tokens
    flops = tokens * unit.flops_per_token(corpus.train.attended_length)
    begin = "" if parent is None else f", a branch of {parent} at step {state.step:,}"
    yield "run", f"{path}{begin}"
    yield "model", f"{describe_model(run, unit)}, context {model.context_length}"
    if source := getattr(run.weights, "path", None):
        yield "weights", f"{option_name(run.weights)}, {source}"
        place = getattr(run.tokenizer, "path", "")
        yield "tokenizer", f"{option_name(run.tokenizer)}{f', {place}' if place else ''}"
    trained, whole = unit.count_parameters()
    if trained < whole:
        yield "trained", f"{trained:,} of {whole:,} parameters ({trained / whole:.2%}){_adapters(run.lora)}"
    yield "data", corpus.description
    if corpus.split:
        yield "validation", corpus.split.partition("; from ")[0] if brief else corpus.split
    if template := getattr(run.data, "template", None):
        yield "template", describe(template, parts.tokenizer)
    epochs = (end.position - state.position) / len(corpus.train)
    split = f" in micro-batches of {micro}" if micro < batch else ""
    if corpus.train.mean_length == sequence:
        yield "batch", f"{batch} × {sequence} = {batch * sequence:,} tokens a step{split}"
    else:
        yield "batch", f"{batch} sequences of {corpus.train.mean_length:.0f} tokens on average a step{split}"
    more = f"{'more ' if state.step else ''}step{'s' * (steps_left != 1)}"
    length = f"{steps_left:,} {more}, {count(tokens)} tokens, {significant(epochs)} epochs, {flops:.2e} FLOPs"
    yield "length", length + (f", from step {state.step:,} to {end.step:,}" if state.step else "")
    warmup = run.schedule.warmup(parts.max_steps)
    warming = f", {counted(warmup, 'warm-up step')}" if warmup else ""
    rate_and_schedule = f"learning rate {run.optimizer.lr:g}; schedule {option_name(run.schedule)}{warming}"
    yield "optimizer", f"{option_name(run.optimizer)}, {rate_and_schedule}"
    source = f" ({peak.source})" if peak.source else ""
    most = f"{rate(peak.flops, 'FLOP/s')} at most{source}"
    yield "device", f"{device_name(parts.device)}, {parts.precision.name}, {most}"
    if (processes := parts.parallel.world.size) > 1:
        degrees = run.distributed.mesh(processes).degrees.items()
        mesh = " × ".join(f"{key} {degree}" for key, degree in degrees if degree > 1)
        yield "processes", f"{processes}: {mesh}"
    if parts.precision.notice:
        yield "precision", parts.precision.notice


def describe_model(run: RunConfig, unit: TrainingUnit) -> str:
    """The architecture of the model, its layers and its size: "llama, 4 layers of 192, 2.4M parameters"."""
    width = getattr(run.model, "hidden_size", None) or unit.model.head_weight.shape[1]  # ranks may have divided it
    layers = f"{unit.num_layers} layer{'s' * (unit.num_layers != 1)} of {width}"
    return f"{option_name(run.model)}, {layers}, {count(unit.model.num_parameters())} parameters"


def _adapters(lora: Lora) -> str:
    if not isinstance(lora, LowRankAdaptation):
        return ""
    return f"; {option_name(lora)}, rank {lora.rank}, alpha {lora.alpha:g}, on {', '.join(lora.targets)}"


def summarise(run: RunConfig, loop: Loop, reason: str) -> dict[str, Any]:
    """The content of ``summary.json``."""
    state, evaluator = loop.state, loop.evaluator
    profile = loop.log.timer.profiler.path
    best = evaluator.validation_scores.get(state.best_val_step or 0)
    return {
        "exit_reason": reason,
        "name": run.name,
        "verb": run.objective.verb,
        "step": state.step,
        "max_steps": loop.max_steps,
        "tokens": state.tokens,
        "train_seconds": round(state.train_seconds, 3),
        "tokens_per_second": round(state.tokens / state.train_seconds, 1) if state.train_seconds else None,
        "final_loss": finite(loop.last_loss),
        "final_train_loss": finite(evaluator.last_train_loss),
        "final_val_loss": finite(evaluator.last_val_loss),
        "best_val_loss": finite(state.best_val_loss),
        "best_val_step": state.best_val_step,
        **evaluator.last_measures,
        **({"best_accuracy": -best[0]} if best is not None and "accuracy" in evaluator.last_measures else {}),
        "keep_best": loop.saver.policy.keep_best,
        "keeps_best": loop.saver.policy.keeps_best(state.best_val_step or 0),
        "refused_steps": state.refused_steps,
        "skipped_sequences": state.skipped_sequences,
        "parameters": loop.step.unit.model.num_parameters(),
        "time_shares": loop.log.timer.shares(),
        "profile": None if profile is None else str(profile),
    }


def finite(value: float | None) -> float | None:
    """``value``, or None where it is not finite: JSON has no NaN."""
    return value if value is not None and math.isfinite(value) else None
