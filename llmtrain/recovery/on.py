"""A ladder against spikes: refuse the update, skip data, roll back, lower the rate, give up."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from llmtrain.base.checks import fraction, non_negative, positive
from llmtrain.base.options import RunFacts
from llmtrain.base.stored_files import COUNT, NUMBER, OBJECT, build_typed, check_kinds
from llmtrain.recovery import Action, Failure, RateReduction, RecoveryConfig, Rollback, Skip, Verdict
from llmtrain.recovery.delayed import DelayedRecovery
from llmtrain.recovery.window import Window


@dataclass(frozen=True)
class RecoveryOn(RecoveryConfig):
    """Settings of ``recovery=on``; ``conf/recovery/on.yaml`` explains every key."""

    window_steps: int
    min_window_steps: int
    loss_deviations: float
    loss_floor: float
    grad_norm_deviations: float
    grad_norm_floor: float
    calm_steps: int
    skip_after: int
    skip_batches: int
    max_skips: int
    rollback_after: int
    rollback_steps: int
    rollback_skip_batches: int
    max_rollbacks: int
    lower_rate_at: int
    lower_rate_factor: float
    lower_rate_steps: int
    max_refused: int
    forget_steps: int
    examples: int

    def __post_init__(self) -> None:
        at_least_one = (
            "window_steps", "min_window_steps", "calm_steps", "skip_batches", "max_skips", "max_rollbacks",
            "lower_rate_factor", "lower_rate_steps", "max_refused",
        )  # fmt: skip
        positive(**{key: getattr(self, key) for key in at_least_one})
        others = (field.name for field in fields(self) if field.name not in at_least_one)
        non_negative(**{key: getattr(self, key) for key in others})
        fraction(lower_rate_factor=self.lower_rate_factor)
        if self.min_window_steps > self.window_steps:
            raise ValueError(
                f"min_window_steps={self.min_window_steps}: never reached, the window holds "
                f"window_steps={self.window_steps}; take at most that"
            )
        if 0 < self.rollback_after <= self.skip_after:
            raise ValueError(
                f"skip_after={self.skip_after}: not reached before rollback_after={self.rollback_after}; "
                "take less, or 0 to skip no data"
            )
        if self.max_refused <= max(self.rollback_after, self.skip_after):
            raise ValueError(
                f"max_refused={self.max_refused}: reached before skip_after={self.skip_after} and "
                f"rollback_after={self.rollback_after} have been tried; take more"
            )

    def build(self, device: torch.device, *, judges_spikes: bool = True) -> "Ladder":
        return Ladder(self if judges_spikes else replace(self, loss_deviations=0.0, grad_norm_deviations=0.0), device)

    def unread(self, run: RunFacts) -> dict[str, str]:
        unread = super().unread(run)
        if self.min_window_steps >= run.steps:
            why = (
                f"{run.end}, and spikes are judged after recovery.min_window_steps={self.min_window_steps} of them; "
                f"recovery.min_window_steps={run.tenth}"
            )
            unread |= dict.fromkeys(("loss_deviations", "loss_floor", "grad_norm_deviations", "grad_norm_floor"), why)
        if not self.skip_after:
            unread["skip_batches"] = "no data are skipped with recovery.skip_after=0; recovery.skip_after=2"
        if not self.rollback_after:
            why = "the run never rolls back with recovery.rollback_after=0; recovery.rollback_after=8"
            unread |= dict.fromkeys(("rollback_steps", "rollback_skip_batches", "max_rollbacks"), why)
        if not self.lower_rate_at:
            why = "the learning rate is never lowered with recovery.lower_rate_at=0; recovery.lower_rate_at=2"
            unread |= {"lower_rate_factor": why, "lower_rate_steps": why}
        if not self.loss_deviations:
            unread["loss_floor"] = "the loss is not judged with recovery.loss_deviations=0; recovery.loss_deviations=12"
        if not self.grad_norm_deviations:
            unread["grad_norm_floor"] = (
                "gradient norms are not judged with recovery.grad_norm_deviations=0; recovery.grad_norm_deviations=100"
            )
        return unread


@dataclass
class Episode:
    """A run of steps that begins with a refused one and lasts until the run is calm again."""

    first_step: int
    first_position: int  # in the data, sequences
    refused: int = 0  # steps
    accepted: int = 0  # steps
    calm: int = 0  # accepted steps since the last refused one
    skips: int = 0  # times that data was skipped
    skipped_at: int = 0  # the step launched at the last skip
    since_skip: int = 0  # refused steps launched after the last skip


@dataclass
class Attempts:
    """Counts of the upper rungs used since they were last forgotten."""

    setbacks: int = 0  # times that ``rollback_after`` was reached, with or without a checkpoint to return to
    last_setback: int = 0  # the furthest step of any setback
    skips: int = 0
    rollbacks: int = 0
    lowerings: int = 0


class Ladder(DelayedRecovery):
    """The recovery of ``recovery=on``.

    A step is refused if loss or gradient norm is not finite or above the limit of the :class:`Window` of accepted
    steps.  Refused steps that are close together make an episode, and their number decides the rung.  After
    ``skip_after`` of them data is skipped, twice as much after as many again, and so on: a bad stretch of the data
    ends, and the weights are still good.  After ``rollback_after`` the run rolls back, from the ``lower_rate_at``-th
    time on at a lower rate.  The next episode starts at the bottom again; the uses of the upper rungs are forgotten
    once the run is ``forget_steps`` past the place.

    A loss that stays too high is an episode too: as long as no step is accepted, the window does not follow.  If no
    rollback is possible, the rate is lowered and the window restarted; otherwise the updates that could lower the
    loss would be refused.
    """

    def __init__(self, config: RecoveryOn, device: torch.device) -> None:
        super().__init__()
        self.config = config
        self.window = Window(
            device,
            config.window_steps,
            config.min_window_steps,
            (config.loss_deviations, config.grad_norm_deviations),
            (config.loss_floor, config.grad_norm_floor),
        )
        self.episode: Episode | None = None
        self.tried = Attempts()
        self.factor = 1.0  # on the learning rate, before the 0-based step lowered_until
        self.lowered_until = 0
        self.ignored_until = 0  # steps up to this one were judged by a window that has been restarted since
        self.batch_size: int | None = None  # of the last step considered
        self.requested: tuple[Verdict, int] | None = None  # a Rollback's refused step, and the step launched by then

    # --- every step ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def judge(self, loss: Tensor, norm: Tensor) -> dict[str, Tensor]:
        observed = torch.stack([loss, norm]).float()
        limits = self.window.limits()
        finite = observed.isfinite().all()
        accepted = finite & (observed <= limits).all()
        self.window.add(observed, accepted)
        loss_limit, grad_norm_limit = limits.unbind()
        refused, non_finite = (~accepted).float(), (~finite).float()
        return {
            "refused": refused,
            "non_finite": non_finite,
            "loss_limit": loss_limit,
            "grad_norm_limit": grad_norm_limit,
        }

    def rate_factor(self, step: int) -> float:
        return self.factor if step < self.lowered_until else 1.0

    def consider(self, verdict: Verdict, step: int) -> list[Action]:
        if self.batch_size is not None and verdict.batch_size < self.batch_size:
            self.start_over(step)  # smaller batches are noisier than those in the window
        self.batch_size = verdict.batch_size
        if verdict.scaler_overflow or verdict.step <= self.ignored_until:
            return []
        if verdict.refused:
            return self.climb(verdict, step)
        if self.episode is not None:
            self.episode.accepted += 1
            self.episode.calm += 1
            if self.episode.calm >= self.config.calm_steps:
                self.episode = None
        return []

    # --- the rungs ----------------------------------------------------------------------------------------------

    def climb(self, verdict: Verdict, step: int) -> list[Action]:
        """The actions of the rung that one more refused step leads to."""
        config = self.config
        if self.episode is None:
            self.episode = Episode(verdict.step, verdict.position)
            if config.forget_steps and verdict.step > self.tried.last_setback + config.forget_steps:
                self.tried = Attempts()
        episode = self.episode
        episode.refused += 1
        episode.calm = 0
        episode.since_skip += verdict.step > episode.skipped_at  # not those launched before the skip
        if config.rollback_after and episode.refused >= config.rollback_after:
            return self.request_rollback(verdict, step)
        if episode.refused >= config.max_refused:
            return self.last_resort(verdict, step)
        if 0 < config.skip_after <= episode.since_skip and episode.skips < config.max_skips:
            batches = config.skip_batches * 2**episode.skips
            episode.skips += 1
            episode.skipped_at, episode.since_skip = step, 0
            self.tried.skips += 1
            return [Skip(batches)]
        return []

    def request_rollback(self, verdict: Verdict, step: int) -> list[Action]:
        """Request a rollback, or give up after ``max_rollbacks`` of them."""
        assert self.episode is not None
        if self.tried.setbacks >= self.config.max_rollbacks:
            return self.give_up(verdict)
        self.tried.setbacks += 1
        self.tried.last_setback = max(self.tried.last_setback, verdict.step)
        self.requested = verdict, step
        before = max(self.episode.first_step - self.config.rollback_steps, 0)
        return [Rollback(before, self.config.rollback_skip_batches)]

    def rolled_back(self, to_step: int | None, stored: Mapping[str, Any] | None) -> list[Action]:
        assert self.requested is not None, "no Rollback was requested"
        verdict, step = self.requested
        self.requested = None
        if to_step is None:
            return self.last_resort(verdict, step)
        self.forget_pending()
        self.window.load_state_dict((stored or {}).get("window", {}))
        self.episode = None
        self.ignored_until = 0
        self.batch_size = None
        self.tried.rollbacks += 1
        if 0 < self.config.lower_rate_at <= self.tried.setbacks:
            return self.lower_rate(to_step)
        return []

    def last_resort(self, verdict: Verdict, step: int) -> list[Action]:
        """Continue from here at a lower rate with a new window; or give up if that cannot help."""
        assert self.episode is not None
        stuck = not verdict.finite and not self.episode.accepted  # no update gets through, at whatever rate
        if not self.config.lower_rate_at or stuck or step < self.lowered_until:
            return self.give_up(verdict)
        self.start_over(step)
        return self.lower_rate(step)

    def start_over(self, step: int) -> None:
        """Restart the window from the steps after ``step``."""
        self.episode = None
        self.window.restart()
        self.ignored_until = step

    def lower_rate(self, step: int) -> list[Action]:
        """Lower the rate for the steps from the 0-based ``step`` on, further if it is lowered already."""
        self.factor = self.rate_factor(step) * self.config.lower_rate_factor
        self.lowered_until = step + self.config.lower_rate_steps
        self.tried.lowerings += 1
        return [RateReduction(self.factor, self.config.lower_rate_steps)]

    def give_up(self, verdict: Verdict) -> list[Action]:
        """The failure, with its explanation for the user."""
        episode, tried = self.episode, self.tried
        assert episode is not None
        counted = (
            (tried.skips, "skipped data"),
            (tried.rollbacks, "rolled back to a checkpoint"),
            (tried.setbacks - tried.rollbacks, "found no checkpoint old enough"),
            (tried.lowerings, "lowered the learning rate"),
        )
        attempts = ", ".join(f"{what} {_times(number)}" for number, what in counted if number)
        intended = "; if the data is meant to change here: recovery=off, or larger recovery.loss_deviations and "
        intended += "recovery.grad_norm_deviations"
        return [
            Failure(
                f"step {verdict.step}: {verdict.reason}; {_steps(episode.refused)} refused since step "
                f"{episode.first_step}, none of which reached the weights. Tried before: {attempts or 'nothing'}. "
                "Usual remedies: a lower optimizer.lr, a longer schedule.warmup_steps, clipping=norm with a smaller "
                "clipping.max_norm, precision=fp32; a look at the data, positions "
                f"{episode.first_position} to {verdict.position + verdict.batch_size - 1} of its order"
                f"{intended if verdict.finite else ''}."
            )
        ]

    # --- resuming -----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        assert self.requested is None, "a requested Rollback is not answered yet"
        return super().state_dict() | {
            "window": self.window.state_dict(),
            "episode": None if self.episode is None else asdict(self.episode),
            "tried": asdict(self.tried),
            "factor": self.factor,
            "lowered_until": self.lowered_until,
            "passed_over": self.ignored_until,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        check_kinds(state, dict.fromkeys(("lowered_until", "passed_over"), COUNT), "recovery")
        check_kinds(state, {"factor": NUMBER, "window": OBJECT}, "recovery")
        self.window.load_state_dict(state.get("window", {}))
        episode = state.get("episode")
        self.episode = build_typed(Episode, episode, "recovery.episode") if episode else None
        self.tried = build_typed(Attempts, state.get("tried", {}), "recovery.tried")
        self.factor = state.get("factor", 1.0)
        self.lowered_until = state.get("lowered_until", 0)
        self.ignored_until = state.get("passed_over", 0)
        self.batch_size = None  # known again from the pending steps


def _times(number: int) -> str:
    return {1: "once", 2: "twice"}.get(number, f"{number} times")


def _steps(number: int) -> str:
    return "1 step" if number == 1 else f"{number} steps"
