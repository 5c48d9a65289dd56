"""Checks before step 1 for silent failures: a config can be valid and still not do what it seems to.

A check is a function of a :class:`llmtrain.lint.case.Case` that yields findings.  It changes nothing, draws no random
number, and its time does not grow with the corpus or the run.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

from llmtrain.lint import data, rates, training
from llmtrain.lint.case import Case, Finding
from llmtrain.lint.overlap import validation_in_training
from llmtrain.lint.served_text import served_text
from llmtrain.lint.split import share_of_validation, unlike_validation
from llmtrain.lint.unread import unread_keys

__all__ = ["Case", "Finding", "lint", "lint_changes", "refuse"]

Check = Callable[[Case], Iterator[Finding]]

OF_SETTINGS: tuple[Check, ...] = (
    training.nothing_trainable,
    training.oversized_adapters,
    rates.schedule,
    rates.learning_rate,
    rates.batch_of_recipe,
    data.repetition,
    data.batch_beyond_data,
    data.untrained_positions,
    data.unused_vocabulary,
    training.clipping_too_late,
    training.slow_arithmetic,
    training.lost_work,
    training.default_on_cpu,
    served_text,
    unread_keys,
)
OF_DATA: tuple[Check, ...] = (  # these read the data
    data.masked_targets,
    validation_in_training,
    share_of_validation,
    unlike_validation,
)


def lint(case: Case) -> list[Finding]:
    """Find what is wrong with a run that is about to start; errors come first."""
    findings = _findings(case, (*OF_DATA, *OF_SETTINGS))
    return sorted(findings, key=lambda finding: finding.level != "error")


def lint_changes(before: Case, after: Case) -> list[Finding]:
    """Find what the changes from ``before`` to ``after`` bring about; a finding that holds for both is left out.

    The run is resumed: its data are those that it was started on, and are not checked again.
    """
    known = set(_findings(replace(before, overrides=(), is_resumed=True), OF_SETTINGS))
    found = _findings(replace(after, is_resumed=True), OF_SETTINGS)
    return [finding for finding in found if finding not in known]


def refuse(findings: Iterable[Finding]) -> None:
    """Raise ValueError, with its message, for the first error among ``findings``."""
    for finding in findings:
        if finding.level == "error":
            raise ValueError(finding.message)


def _findings(case: Case, checks: Sequence[Check]) -> list[Finding]:
    return [finding for check in checks for finding in check(case)]
