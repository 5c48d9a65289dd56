"""Changes of settings when a run is resumed: found, refused where nothing can continue, and reported."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from llmtrain.config import stored_config
from llmtrain.config.run_config import RunConfig
from llmtrain.config.secret_values import redact
from llmtrain.config.stored_config import CACHE, NOT_RUN_KEYS, flatten
from llmtrain.train.length import TrainingLength
from llmtrain.train.state import TrainState

Change = tuple[str, Any, Any]  # dotted key, stored value, new value

ABSENT = "not stored"  # the stored value of a key that the stored config does not have

# Values that a resume cannot change: the tensors would not fit, or the data order would differ.
FIXED = ("name", "model.", "tokenizer.", "objective.", "data.", "lora.", "weights.", "runtime.seed")
# Places, whose content is compared instead: with the data's fingerprint, the tokenizer's copy, the base's fingerprint.
MOVABLE = ("data.path", "data.validation_path", "tokenizer.path", "tokenizer.encoding", "weights.path")


def changes(before: Mapping[str, Any], run: RunConfig) -> list[Change]:
    """The values of ``run`` that are not those of the stored config ``before``; secrets and paths are left out.

    Keys of an option that is no longer used are not listed: they follow from the new option.
    """
    old, new = (flatten(redact(each)) for each in (before, stored_config.to_plain(run)))
    return [
        (key, old.get(key, ABSENT), value)
        for key, value in new.items()
        if old.get(key, ABSENT) != value and key not in (*NOT_RUN_KEYS, CACHE)
    ]


def since_older_version(changes: Sequence[Change], before: Mapping[str, Any]) -> list[Change]:
    """``changes``, a group that the stored config ``before`` did not have shortened to its option."""
    return [row for row in changes if row[0].split(".")[0] in before or row[0].endswith("._target_")]


def check_changes(changes: Sequence[Change], *, branching: bool, has_base: bool = False) -> None:
    """Raise ValueError, naming the key, for a change that a resume cannot make.

    A branch may have another name.  Places may be others; the caller compares their content.
    """
    movable = (*MOVABLE, *["name"] * branching)
    for key, before, after in changes:
        if key.startswith(FIXED) and key not in movable:
            refuse_change(key, before, after, has_base=has_base)


def refuse_change(key: str, before: Any, after: Any, *, has_base: bool = False) -> NoReturn:
    """Raise ValueError about a change that a resume cannot make."""
    remedy = f"start a new run with it, llmtrain train … {key}={_shown(after)}"
    if not has_base and not key.startswith(("model.", "tokenizer.", "lora.")):
        remedy += ", from its weights with: weights=checkpoint weights.path=RUN_DIR"
    raise ValueError(
        f"{key}={_shown(after)}: this run was started with {_shown(before)}, and cannot continue with another; {remedy}"
    )


def _shown(value: Any) -> str:
    """A config value as it is typed."""
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)


def check_length(
    before: RunConfig,
    run: RunConfig,
    length_before: TrainingLength,
    length: TrainingLength,
    state: TrainState,
    kept: Sequence[int] = (),
) -> None:
    """Raise ValueError if the run, of ``length``, cannot continue from ``state`` to its end.

    ``before`` is the run as it was stored, ``kept`` the steps that have a checkpoint.
    """
    max_steps = length.max_steps
    if state.step > max_steps:
        earlier = max((step for step in kept if step <= max_steps), default=None)
        branch = "" if earlier is None else f", or branch from an earlier checkpoint: step={earlier}"
        raise ValueError(
            f"loop.max_steps={max_steps}: the run is already at step {state.step}; take more, as in "
            f"loop.max_steps={state.step + max_steps}{branch}"
        )
    if max_steps == run.loop.max_steps or run.loop.epochs is None or run.accumulation == before.accumulation:
        return
    if length.place_after(state.step).position != length_before.place_after(state.step).position:
        batch = run.accumulation.batch_size_at(state.step, state.tokens)
        end = run.loop.end_position(len(length.sizes.sequences))
        left = math.ceil(max(end - state.position, 0) / batch)
        raise ValueError(
            f"loop.epochs={run.loop.epochs:g}: counts in steps of the batch size that the run has from step 0 on, and "
            f"the batch size changes; give the end in steps: loop.epochs=null loop.max_steps={state.step + left}"
        )


def rates(
    before: RunConfig, steps_before: int, run: RunConfig, max_steps: int, step: int
) -> tuple[float, float] | None:
    """The learning rate of the step after ``step`` by the stored config and now; None where it is the same.

    Beyond the stored end the stored rate is that of the last step.  The factor of a recovery is left out of both.
    """
    if step >= max_steps:
        return None
    old = before.schedule(min(step, steps_before - 1), peak=before.optimizer.lr, total=steps_before)
    new = run.schedule(step, peak=run.optimizer.lr, total=max_steps)
    return None if math.isclose(old, new, rel_tol=1e-6, abs_tol=1e-15) else (old, new)
