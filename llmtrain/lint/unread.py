"""Keys that the user has set and that the run does not read.

Each option says which of its own keys that holds for (:meth:`llmtrain.base.options.Option.unread`).  Here are only the
rules between groups.
"""

from collections.abc import Iterator
from dataclasses import fields

from llmtrain.base.options import Option, option_name
from llmtrain.config.secret_values import redact_arguments
from llmtrain.lint.case import Case, Finding, warning
from llmtrain.schedule.linear_warmup_cosine_lr import LinearWarmupCosineLR
from llmtrain.train.profiler import FIRST
from llmtrain.weights.scratch import Scratch


def unread_keys(case: Case) -> Iterator[Finding]:
    """Keys of the command line that nothing reads; each once."""
    reasons = of_options(case) | between_groups(case)
    for key, value in case.given.items():
        if key in reasons:
            (shown,) = redact_arguments([f"{key}={value}"])
            yield warning(key, f"{shown}: has no effect: {reasons[key]}")


def of_options(case: Case) -> dict[str, str]:
    """The keys that the options themselves name, with their groups, and the reasons."""
    reasons: dict[str, str] = {}
    for field in fields(case.run):
        option = getattr(case.run, field.name)
        if isinstance(option, Option):
            unread = option.unread(case.facts)
            reasons |= {f"{field.name}.{key}" if key else field.name: why for key, why in unread.items()}
    return reasons


def between_groups(case: Case) -> dict[str, str]:
    """The keys that nothing reads because of another group, or of the command, and the reasons."""
    run, reasons = case.run, {}
    if isinstance(run.schedule, LinearWarmupCosineLR) and run.schedule.init_lr != run.optimizer.lr:
        reasons["optimizer.lr"] = (
            f"schedule.init_lr={run.schedule.init_lr:g} is the peak of this schedule; leave out schedule.init_lr"
        )
    if not isinstance(run.weights, Scratch):
        why = "every weight is loaded; weights=scratch starts from the model's own initialisation"
        reasons |= {"model.initialisation": why, "model.initial_std": why}
    if run.runtime.profile and case.max_steps < FIRST:
        reasons["runtime.profile"] = f"{case.facts.end}, and steps are profiled from step {FIRST} on; a longer run"
    if run.lora.adapts:
        why = f"with lora={option_name(run.lora)} its adapters and the head are trained; lora=none"
        reasons |= {"objective.train": why, "objective.last_layers": why}
    if run.run_dir:
        reasons["output_dir"] = f"run_dir={run.run_dir} is the directory; leave out one of the two"
    return reasons
