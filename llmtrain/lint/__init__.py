"""Checks before step 1 for what would fail in silence: a config can be valid and still not do what it seems to.

A check is a function of a :class:`llmtrain.lint.case.Case` that yields findings.  It changes nothing, draws no random
number, and its time does not grow with the corpus or the run.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

from llmtrain.lint import data, rates, training
from llmtrain.lint.case import Built, Case, Finding, Settings
from llmtrain.lint.inert import inert_keys
from llmtrain.lint.overlap import validation_in_training

__all__ = ["Built", "Finding", "Settings", "lint", "lint_changes", "refuse"]

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
    inert_keys,
)
OF_DATA: tuple[Check, ...] = (data.masked_targets, validation_in_training)  # these read them


def lint(run: Settings, parts: Built, overrides: Sequence[str] = ()) -> list[Finding]:
    """What is wrong with a run that is about to start, errors first.

    ``parts`` may be less than a run is built of: a model on the meta device, no optimizer.  ``overrides`` are what the
    user has set, as ``key=value``; the keys among them that nothing reads are found.
    """
    findings = _findings(Case(run, parts, overrides), (*OF_DATA, *OF_SETTINGS))
    return sorted(findings, key=lambda finding: finding.level != "error")


def lint_changes(
    before: Settings, parts_before: Built, run: Settings, parts: Built, overrides: Sequence[str]
) -> list[Finding]:
    """What the changes from ``before`` to ``run`` bring about: what was so before is not said again.

    The data are those that the run was started on, and not looked at once more.
    """
    known = set(_findings(Case(before, parts_before, (), is_resumed=True), OF_SETTINGS))
    return [
        finding
        for finding in _findings(Case(run, parts, overrides, is_resumed=True), OF_SETTINGS)
        if finding not in known
    ]


def refuse(findings: Iterable[Finding]) -> None:
    """Raise ValueError, with its message, for the first error among ``findings``."""
    for finding in findings:
        if finding.level == "error":
            raise ValueError(finding.message)


def _findings(case: Case, checks: Sequence[Check]) -> list[Finding]:
    return [finding for check in checks for finding in check(case)]
