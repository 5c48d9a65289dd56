"""Base classes of schedules with a linear warm-up."""

from abc import abstractmethod
from dataclasses import dataclass

from llmtrain.base.checks import fraction, non_negative
from llmtrain.base.options import RunFacts
from llmtrain.schedule import Schedule


@dataclass(frozen=True)
class Warmup(Schedule):
    """``lr = initial_lr + step * (peak - initial_lr) / warmup`` for ``step < warmup``, then :meth:`after_warmup`.

    ``warmup`` is ``warmup_steps`` if given, else ``round(warmup_ratio * total)``.  A warm-up longer than the run
    stops with the run.
    """

    initial_lr: float
    warmup_steps: int | None
    warmup_ratio: float

    def __post_init__(self) -> None:
        non_negative(initial_lr=self.initial_lr, warmup_steps=self.warmup_steps)
        fraction(warmup_ratio=self.warmup_ratio)

    def __call__(self, step: int, *, peak: float, total: int) -> float:
        step = min(step, total - 1)
        warmup = self.warmup(total)
        if step < warmup:
            return self.initial_lr + step * (peak - self.initial_lr) / warmup
        return self.after_warmup(step, peak=peak, warmup=warmup, total=total)

    def warmup(self, total: int) -> int:
        return round(self.warmup_ratio * total) if self.warmup_steps is None else self.warmup_steps

    @abstractmethod
    def after_warmup(self, step: int, *, peak: float, warmup: int, total: int) -> float:
        """The learning rate of ``step``, where ``warmup <= step < total``."""

    def check_peak(self, peak: float) -> None:
        self._check_below_peak(peak, "initial_lr")

    def unread(self, run: RunFacts) -> dict[str, str]:
        unread = super().unread(run)
        if self.warmup_steps is not None:
            unread["warmup_ratio"] = (
                f"schedule.warmup_steps={self.warmup_steps} is used instead; schedule.warmup_steps=null"
            )
        if not self.warmup(run.steps):
            unread["initial_lr"] = f"it is the start of a warm-up, and there is none; schedule.warmup_steps={run.tenth}"
        return unread

    def _check_below_peak(self, peak: float, key: str) -> None:
        if (value := getattr(self, key)) > peak:
            raise ValueError(f"{key}={value}: above the peak, optimizer.lr={peak}; lower it or raise optimizer.lr")


@dataclass(frozen=True)
class WarmupDecay(Warmup):
    """A warm-up followed by a decay that ends at ``min_lr``."""

    min_lr: float

    def __post_init__(self) -> None:
        super().__post_init__()
        non_negative(min_lr=self.min_lr)

    def check_peak(self, peak: float) -> None:
        super().check_peak(peak)
        self._check_below_peak(peak, "min_lr")
