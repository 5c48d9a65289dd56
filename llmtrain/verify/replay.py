"""Replay of training steps outside the run, and their comparison with the run's records."""

import contextlib
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmtrain.base.run_files import CONFIG, METRICS
from llmtrain.checkpoint.format import read_state
from llmtrain.checkpoint.model_state import saved_tensors
from llmtrain.checkpoint.optimizer_state import state_tensors
from llmtrain.checkpoint.stored_tensors import read_group
from llmtrain.config import stored_config
from llmtrain.config.assemble import assemble, check_data, first_state
from llmtrain.config.older_versions import complete
from llmtrain.metrics import read_metrics
from llmtrain.run.directory import RunDirectory
from llmtrain.run.environment import describe_environment, difference_of_machine, processes_of
from llmtrain.run.resume import Carryover
from llmtrain.run.run import Run
from llmtrain.run.session import quiet_loop
from llmtrain.run.tokenizer_copy import stored_tokenizer
from llmtrain.train.state import TrainState, parse_state

COMPARED_KEYS = ("loss", "grad_norm", "learning_rate", "tokens")  # of a metrics row
NOT_COMPARED = ("format", "train_seconds", "best_val_loss", "best_val_step")  # keys of the state: time, evaluations


@dataclass(frozen=True)
class ReplayResult:
    """Metrics and final state of the replayed steps."""

    inexact: str | None  # the reason why bits may differ from the run's; None if they must not
    rows: list[dict[str, Any]]  # a metrics row for every replayed step
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]  # as state.json


def replay(
    run: Run,
    directory: RunDirectory,
    scratch: Path,
    checkpoint: Path | None,
    end: int,
    progress: Callable[[], None],
    *,
    named_tokenizer: bool = False,
) -> ReplayResult:
    """Train from ``checkpoint`` (None: from the start) to step ``end``, writing only into ``scratch``.

    Raises ValueError if the data have changed since the run.
    """
    scratch_run = RunDirectory(scratch)
    shutil.copy(directory.config, scratch_run.config)
    with contextlib.ExitStack() as stack:
        device = stack.enter_context(run.runtime.session(directory.recorded_threads()))
        run.runtime.seed_everything()
        tokenizer = stored_tokenizer(run.tokenizer, directory.path, named=named_tokenizer)
        parts = assemble(run, device, tokenizer=tokenizer, from_start=checkpoint is None, verify_data=True)
        if checkpoint is None:
            state = first_state(run, parts)
        else:
            carryover = Carryover.between(complete(stored_config.load(checkpoint / CONFIG)), run)
            state = carryover.restore(checkpoint, parts, run)
        check_data(run, state, parts)
        parts = replace(parts, length=run.length(parts.corpus.train, short=state.short_sequences))
        restore_tuning(state, directory)
        inexact = inexactness_reason(run, directory, device)
        loop, _ = stack.enter_context(quiet_loop(run, parts, scratch_run, state))
        while loop.state.step < end:
            loop.advance()
            progress()
        loop.capture_state()
        rows = [row for row in read_metrics(scratch / METRICS) if "loss" in row and "event" not in row]
        model = {name: tensor.cpu() for name, tensor in saved_tensors(parts.unit).items()}
        optimizer = {name: tensor.cpu() for name, tensor in state_tensors(parts.optimizer).items()}
        return ReplayResult(inexact, rows, model, optimizer, json.loads(json.dumps(loop.state.to_json())))


@dataclass
class ComparedGroup:
    """The comparison of one group of values, such as all weights."""

    name: str
    count: int = 0
    equal: int = 0
    worst: float = 0.0  # largest relative difference
    first_difference: str = ""

    def add(self, label: str, equal: bool, difference: float, shown: str) -> None:
        """Add the comparison of one value."""
        self.count += 1
        self.equal += equal
        if not equal:
            self.worst = max(self.worst, difference) if not math.isnan(difference) else math.inf
            self.first_difference = self.first_difference or f"{label}: {shown}"


@dataclass
class ReplayComparison:
    """The comparison of a replay with the run."""

    groups: list[ComparedGroup] = field(default_factory=list)
    remark: str = ""

    @property
    def equal(self) -> bool:
        """True if all values agree bit for bit."""
        return all(group.equal == group.count for group in self.groups)


def compare(replayed: ReplayResult, directory: RunDirectory, last: Path | None) -> ReplayComparison:
    """Compare with the run's metrics and with the checkpoint ``last`` (None: the replay ended before it)."""
    comparison = ReplayComparison([_compare_rows(replayed, read_metrics(directory.metrics))])
    if last is None:
        comparison.remark = "the replay ended before the last checkpoint: losses and norms were compared, tensors not"
        return comparison
    for name, group, tensors in (
        ("weights", "model", replayed.model),
        ("optimizer state", "optimizer", replayed.optimizer),
    ):
        comparison.groups.append(_compare_tensors(name, tensors, read_group(last, group)))
    ranks = processes_of(directory.read_environment())  # more than one seed their generators at every step
    left_out = NOT_COMPARED if ranks == 1 else (*NOT_COMPARED, "rng")
    comparison.groups.append(_compare_state(replayed.state, read_state(last), left_out))
    return comparison


def _compare_rows(replayed: ReplayResult, recorded: list[dict[str, Any]]) -> ComparedGroup:
    group = ComparedGroup("losses, norms, rates")
    rows = {row["step"]: row for row in recorded if "loss" in row and "event" not in row}
    for row in replayed.rows:
        stored = rows.get(row["step"])
        for key in COMPARED_KEYS if stored is not None else ():
            before, now = (stored or {}).get(key), row[key]
            if before is None:
                group.add(f"step {row['step']}", False, math.inf, f"{key} {now!r}, none recorded")
                continue
            equal = before == now or (before != before and now != now)
            shown = f"{key} {now!r}, recorded {before!r}"
            group.add(f"step {row['step']}", equal, _relative(now - before, before), shown)
    return group


def _compare_tensors(name: str, now: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> ComparedGroup:
    group = ComparedGroup(name)
    for key in sorted(now.keys() | before.keys()):
        if key not in now or key not in before:
            group.add(f"{name} {key}", False, math.inf, "is stored by only one of the two")
            continue
        one, other = now[key].contiguous(), before[key]
        same_kind = one.shape == other.shape and one.dtype == other.dtype
        equal = same_kind and torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))
        norm = other.double().norm().item()
        difference = _relative((one.double() - other.double()).norm().item(), norm) if same_kind else math.inf
        group.add(f"{name} {key}", equal, difference, f"differs by {difference:.2g} of its norm")
    return group


def _compare_state(now: Mapping[str, Any], before: Mapping[str, Any], left_out: Sequence[str]) -> ComparedGroup:
    group = ComparedGroup("counters, generators")
    for key in before:
        if key not in left_out:
            difference = _difference(now.get(key), before[key])
            group.add(f"state.json {key}", now.get(key) == before[key], difference, "differs from the stored value")
    return group


def _difference(now: Any, before: Any) -> float:
    """The largest relative difference of the floating-point numbers in two JSON values; of anything else infinity."""
    if isinstance(now, float) and isinstance(before, float):
        return _relative(now - before, before)
    if isinstance(now, dict) and isinstance(before, dict) and now.keys() == before.keys():
        return max((_difference(now[key], before[key]) for key in now), default=0.0)
    if isinstance(now, list) and isinstance(before, list) and len(now) == len(before):
        return max((_difference(one, other) for one, other in zip(now, before, strict=True)), default=0.0)
    return 0.0 if now == before else math.inf


def _relative(difference: float, reference: float) -> float:
    return abs(difference) / max(abs(reference), 1e-30)


def restore_tuning(state: TrainState, directory: RunDirectory) -> None:
    """For a replay from the start, take micro-batch size and compilation from the run's first checkpoint."""
    checkpoints = directory.find_checkpoints()
    if state.step == 0 and checkpoints:
        recorded = parse_state(checkpoints[0], read_state(checkpoints[0]))
        state.compiled, state.micro_batch_size = recorded.compiled, recorded.micro_batch_size


def inexactness_reason(run: Run, directory: RunDirectory, device: torch.device) -> str | None:
    """Return the reason why a replay on ``device`` may give other bits than the run; None if it must not."""
    if device.type == "cuda" and not run.runtime.deterministic:
        return "runtime.deterministic=false on a GPU"
    return difference_of_machine(directory.read_environment(), describe_environment(device, []))
