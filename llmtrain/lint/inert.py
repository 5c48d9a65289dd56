"""Keys that the user has set and that nothing reads, as a table: a line or two a case."""

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from llmtrain.accumulation.ramp import RampedBatch, Stage, Unit
from llmtrain.activation_checkpointing.selective import By, Selective
from llmtrain.data.shards import Shards
from llmtrain.lint.case import Case, Finding, warning
from llmtrain.precision.fp16 import FP16
from llmtrain.recovery.on import RecoveryOn
from llmtrain.schedule.linear_warmup_cosine_lr import LinearWarmupCosineLR
from llmtrain.schedule.step import StepDecay
from llmtrain.schedule.warmup import Warmup
from llmtrain.schedule.wsd import WSD
from llmtrain.train.profiler import FIRST
from llmtrain.weights.scratch import Scratch


class Inert(NamedTuple):
    """Keys that nothing reads."""

    keys: str  # regular expression of whole keys
    is_unread: Callable[[Case], Any]
    why: str  # … and what would work; the names in braces are those of ``facts``


# --- predicates that take more than a line -----------------------------------------------------------------------


def ends_before_epochs(case: Case) -> bool:
    """Whether ``loop.max_steps`` ends the run before ``loop.epochs`` would."""
    loop = case.run.loop
    return loop.epochs is not None and case.max_steps == loop.max_steps and case.epochs < loop.epochs


def ends_before_steps(case: Case) -> bool:
    """Whether ``loop.epochs`` ends the run before ``loop.max_steps`` would."""
    return case.run.loop.max_steps is not None and case.max_steps < case.run.loop.max_steps


def no_validation(case: Case) -> bool:
    """Whether there is nothing to evaluate on."""
    return case.corpus.validation is None


def has_validation_files(case: Case) -> bool:
    """Whether validation is files by their names: what is cut off the tokens has exactly the configured share."""
    data, corpus = case.run.data, case.corpus
    if not isinstance(data, Shards) or corpus.validation is None:
        return False
    tokens = corpus.train.tokens + corpus.validation.tokens
    return data.validation_path is None and corpus.validation.tokens != int(tokens * data.validation_fraction)


def has_no_decay(case: Case) -> bool:
    """Whether a warm-up, stable, decay schedule never decays."""
    rule = case.run.schedule
    return isinstance(rule, WSD) and not (
        round(rule.decay_ratio * case.max_steps) if rule.decay_steps is None else rule.decay_steps
    )


def drops_too_late(case: Case) -> bool:
    """Whether a step decay is still at its peak when the run ends."""
    rule = case.run.schedule
    return isinstance(rule, StepDecay) and (rule.every or rule.milestones[0]) >= case.max_steps


def missed_stages(case: Case) -> list[Stage]:
    """The stages of a batch size ramp that the run never gets to."""
    ramp = case.run.accumulation
    if not isinstance(ramp, RampedBatch):
        return []
    end = case.max_steps if ramp.unit is Unit.steps else case.sequences * case.run.data.sequence_length
    return [stage for stage in ramp.stages if stage.start >= end]


def is_off(case: Case, key: str) -> bool:
    """Whether a part of ``recovery=on`` is switched off by a 0."""
    return isinstance(case.run.recovery, RecoveryOn) and not getattr(case.run.recovery, key)


def judges_too_late(case: Case) -> bool:
    """Whether the run ends before there are enough steps to tell a spike by."""
    return isinstance(case.run.recovery, RecoveryOn) and case.run.recovery.min_window_steps >= case.max_steps


def selects_operations(case: Case) -> bool:
    """Whether what is recomputed in backward is chosen by operation and not by block."""
    option = case.run.activation_checkpointing
    return isinstance(option, Selective) and option.by is By.operation


# --- the table ---------------------------------------------------------------------------------------------------

ENDS = "the run ends after {steps:,} steps"
NO_VALIDATION = "there are no validation data; data.validation_fraction=0.1 sets some aside"
NO_EVALUATION = "nothing is evaluated with loop.eval_every=0; loop.eval_every={tenth}"

TABLE = [
    # the length of the run
    Inert(r"loop\.epochs", ends_before_epochs,
          "loop.max_steps={run.loop.max_steps} ends the run first, after {epochs:.3g} epochs; loop.max_steps=null"),
    Inert(r"loop\.max_steps", ends_before_steps,
          "loop.epochs={run.loop.epochs:g} ends the run first, after {steps:,} steps; loop.epochs=null"),
    # looks
    Inert(r"loop\.eval_(every|batches|train_batches)", lambda c: c.run.loop.eval_every and no_validation(c),
          NO_VALIDATION),
    Inert(r"loop\.eval_(batches|train_batches)", lambda c: not c.run.loop.eval_every, NO_EVALUATION),
    Inert(r"loop\.eval_every", lambda c: c.run.loop.eval_every > c.max_steps,
          ENDS + ", so that only its start and end are evaluated; loop.eval_every={tenth}"),
    Inert(r"loop\.sample_(prompt|tokens|temperature|top_k)", lambda c: not c.run.loop.sample_every,
          "no text is sampled with loop.sample_every=0; loop.sample_every={tenth}"),
    Inert(r"loop\.sample_top_k", lambda c: c.run.loop.sample_temperature == 0,
          "with loop.sample_temperature=0 it is always the most likely token; loop.sample_temperature=0.8"),
    Inert(r"loop\.sample_every", lambda c: c.run.loop.sample_every > c.max_steps,
          ENDS + ", where one sample is taken in any case; loop.sample_every={tenth}"),
    Inert(r"metrics\.log_every", lambda c: c.run.metrics.log_every > c.max_steps,
          ENDS + ", of which the first and the last are logged; metrics.log_every={tenth}"),
    # data
    Inert(r"data\.validation_fraction", lambda c: isinstance(c.run.data, Shards) and c.run.data.validation_path,
          "data.validation_path={run.data.validation_path} is the validation data; leave out either"),
    Inert(r"data\.validation_fraction", has_validation_files,
          "the files of data.path={run.data.path} named val or validation are the validation data, whole; name the "
          "others alone in data.path to have a share of them cut off"),
    # the learning rate
    Inert(r"schedule\.warmup_ratio", lambda c: getattr(c.run.schedule, "warmup_steps", None) is not None,
          "schedule.warmup_steps={run.schedule.warmup_steps} wins; schedule.warmup_steps=null"),
    Inert(r"schedule\.initial_lr",
          lambda c: isinstance(c.run.schedule, Warmup) and not c.run.schedule.warmup(c.max_steps),
          "a warm-up begins with it, and there is none; schedule.warmup_steps={tenth}"),
    Inert(r"schedule\.decay_ratio", lambda c: getattr(c.run.schedule, "decay_steps", None) is not None,
          "schedule.decay_steps={run.schedule.decay_steps} wins; schedule.decay_steps=null"),
    Inert(r"schedule\.(decay_shape|min_lr)", has_no_decay,
          "the learning rate is never lowered; schedule.decay_steps=null schedule.decay_ratio=0.2"),
    Inert(r"schedule\.(milestones|every|factor)", drops_too_late,
          ENDS + ", before the learning rate drops for the first time; an earlier one, such as step {half}"),
    Inert(r"optimizer\.lr",
          lambda c: isinstance(c.run.schedule, LinearWarmupCosineLR) and c.run.schedule.init_lr != c.run.optimizer.lr,
          "schedule.init_lr={run.schedule.init_lr:g} is the peak of this schedule; leave out schedule.init_lr"),
    Inert(r"precision\.growth_interval",
          lambda c: isinstance(c.run.precision, FP16) and c.run.precision.growth_interval > c.max_steps,
          ENDS + ", before the loss scale can grow; precision.growth_interval={tenth}"),
    Inert(r"activation_checkpointing\.every", selects_operations,
          "it counts blocks, and of every block operations are selected; activation_checkpointing.by=block"),
    # the batch
    Inert(r"accumulation\.micro_batch_size", lambda c: c.run.accumulation.micro_batch_size > c.largest_batch,
          "beyond {batch}, which is all that a step takes; a larger step is {batch_key}"),
    Inert(r"accumulation", lambda c: missed_stages(c) and c.largest_batch == c.run.accumulation.batch_size_at(0, 0),
          ENDS + ", before the batch grows for the first time; accumulation.stages with earlier starts"),
    Inert(r"accumulation\.stages", missed_stages,
          "in part: " + ENDS + ", before the last stage; earlier starts, or a longer run"),
    # spikes
    Inert(r"recovery\.skip_batches", lambda c: is_off(c, "skip_after"),
          "no data are left out with recovery.skip_after=0; recovery.skip_after=2"),
    Inert(r"recovery\.(rollback_steps|rollback_skip_batches|max_rollbacks)", lambda c: is_off(c, "rollback_after"),
          "the run never goes back with recovery.rollback_after=0; recovery.rollback_after=8"),
    Inert(r"recovery\.lower_rate_(factor|steps)", lambda c: is_off(c, "lower_rate_at"),
          "the rate is never lowered with recovery.lower_rate_at=0; recovery.lower_rate_at=2"),
    Inert(r"recovery\.loss_floor", lambda c: is_off(c, "loss_deviations"),
          "the loss is not judged with recovery.loss_deviations=0; recovery.loss_deviations=12"),
    Inert(r"recovery\.grad_norm_floor", lambda c: is_off(c, "grad_norm_deviations"),
          "gradient norms are not judged with recovery.grad_norm_deviations=0; recovery.grad_norm_deviations=100"),
    Inert(r"recovery\.(loss|grad_norm)_(deviations|floor)", judges_too_late,
          ENDS + ", and spikes are judged after recovery.min_window_steps={run.recovery.min_window_steps} of them; "
          "recovery.min_window_steps={tenth}"),
    # the model
    Inert(r"model\.(initialisation|initial_std)", lambda c: not isinstance(c.run.weights, Scratch),
          "every weight is loaded; weights=scratch starts from the model's own"),
    # what is stored, and where
    Inert(r"runtime\.profile", lambda c: c.run.runtime.profile and c.max_steps < FIRST,
          ENDS + f", before the steps that are profiled, from step {FIRST} on; a longer run"),
    Inert(r"output_dir", lambda c: c.run.run_dir, "run_dir={run.run_dir} is the directory; leave out either"),
    Inert(r"checkpoint\.every_steps", lambda c: c.run.checkpoint.every_steps > c.max_steps,
          ENDS + ", where one is written in any case; checkpoint.every_steps={tenth}"),
    Inert(r"checkpoint\.(keep_best|keep_every)", lambda c: not c.run.checkpoint.keep_last,
          "checkpoint.keep_last=0 keeps all; checkpoint.keep_last=2"),
    Inert(r"checkpoint\.keep_best", no_validation, NO_VALIDATION),
    Inert(r"checkpoint\.keep_best", lambda c: not c.run.loop.eval_every, NO_EVALUATION),
    Inert(r"checkpoint\.keep_every", lambda c: c.run.checkpoint.keep_every > c.max_steps,
          ENDS + ", so that no step is a multiple; checkpoint.keep_every={tenth}"),
]  # fmt: skip


def inert_keys(case: Case) -> Iterator[Finding]:
    """Keys of the command line that nothing reads; each once."""
    for key, value in case.given.items():
        for row in TABLE:
            if re.fullmatch(row.keys, key) and row.is_unread(case):
                yield warning(key, f"{key}={value}: has no effect: {row.why.format(**facts(case))}")
                break


def facts(case: Case) -> dict[str, Any]:
    """What the explanations name."""
    return {
        "run": case.run,
        "steps": case.max_steps,
        "tenth": max(1, case.max_steps // 10),
        "half": max(1, case.max_steps // 2),
        "epochs": case.epochs,
        "batch": case.largest_batch,
        "batch_key": case.batch_key,
    }
