"""Time, energy, price and disk of a whole run."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from llmtrain.checkpoint.policy import MAX_SHARE, SHORT_SAVE, Checkpoint
from llmtrain.train.config import LoopConfig

SAVED_PER_SECOND = 400e6  # bytes of a checkpoint, hashed, written, synced and read back; an SSD is at least that fast
EVALUATION_SHARE = 1 / 3  # of the FLOPs of a training token: the forward pass alone


@dataclass(frozen=True)
class Speed:
    """The time of each kind of work, in seconds."""

    sequence: float  # of training: forward, backward and its share of the update
    evaluated: float  # for a sequence of evaluation
    sampled: float  # for a token of a sample
    start: float = 0.0  # once: the extra time of the first step, above all compilation

    @classmethod
    def of_flops(
        cls, flops_per_token: int, length: float, rate: float, token_bytes: int, bandwidth: float | None
    ) -> "Speed":
        """Estimate from the FLOP/s of a device; a sampled token reads all weights, ``token_bytes``, once."""
        sequence = flops_per_token * length / rate
        read = token_bytes / bandwidth if bandwidth else 0.0
        token = max(read, EVALUATION_SHARE * flops_per_token / rate, 0.002)  # 2 ms of kernel launches
        return cls(sequence, EVALUATION_SHARE * sequence, token)


@dataclass(frozen=True)
class Counts:
    """The number of steps, evaluations, samples and saves in a run."""

    steps: int
    sequences: int  # trained on
    evaluations: int
    evaluated: int  # sequences of one evaluation
    samples: int
    saves: int
    held_saves: int  # of the saves, those that training waits for
    ahead: int  # of the saves, those made only ahead of an evaluation or sample
    copied_saves: int  # of the saves, those that copy the weights


def count_work(
    loop: LoopConfig, checkpoint: Checkpoint, steps: int, sequences: int, batch: int, validation: int
) -> Counts:
    """Count the work of a run; ``batch``: sequences of the first step, ``validation``: those of the validation data."""
    evaluated = min(validation, validation if loop.eval_batches is None else loop.eval_batches * batch)
    evaluated += loop.eval_train_batches * batch
    saved_ahead = set()
    evaluations = samples = 0
    if loop.eval_every and validation:
        evaluations = 1 + steps // loop.eval_every + bool(steps % loop.eval_every)
        saved_ahead |= {*range(loop.eval_every, steps, loop.eval_every)} if steps // loop.eval_every < 10**6 else set()
    if loop.sample_every:
        samples = steps // loop.sample_every + bool(steps % loop.sample_every)
        saved_ahead |= {*range(loop.sample_every, steps, loop.sample_every)}
    by_steps = set(range(checkpoint.every_steps, steps, checkpoint.every_steps)) if checkpoint.every_steps else set()
    ahead = saved_ahead if checkpoint.before_evaluation else set()
    saves = len(by_steps | ahead) + 1  # one at the end
    held = saves if not checkpoint.asynchronous else len(ahead) + 1
    copied = len(by_steps) if checkpoint.asynchronous else 0
    return Counts(steps, sequences, evaluations, evaluated, samples, saves, held, len(ahead - by_steps), copied)


def without_long_saves(counts: Counts, speed: Speed, checkpoint_bytes: int) -> Counts:
    """Leave out saves ahead of evaluations that would take too much time, as the loop does."""
    save = checkpoint_bytes / SAVED_PER_SECOND
    if save < SHORT_SAVE:
        return counts
    made = min(counts.ahead, 1 + int(MAX_SHARE * counts.sequences * speed.sequence / save))
    fewer = counts.ahead - made
    return replace(counts, saves=counts.saves - fewer, held_saves=counts.held_saves - fewer, ahead=made)


@dataclass(frozen=True)
class Costs:
    """The costs of a whole run."""

    seconds: Mapping[str, float]  # by kind of work
    checkpoint_bytes: int
    disk_bytes: int  # at most, of checkpoints
    watts: float | None
    price_per_hour: float | None

    @property
    def total_seconds(self) -> float:
        """Return the time from the first step to the last save."""
        return sum(self.seconds.values())

    @property
    def kilowatt_hours(self) -> float | None:
        """Return the energy of the device; None where its power is not known."""
        return None if self.watts is None else self.watts * self.total_seconds / 3.6e6

    @property
    def price(self) -> float | None:
        """Return the price, in the currency of ``price_per_hour``."""
        return None if self.price_per_hour is None else self.price_per_hour * self.total_seconds / 3600


def add_up(
    speed: Speed, counts: Counts, loop: LoopConfig, checkpoint: Checkpoint, checkpoint_bytes: int,
    *, watts: float | None, price_per_hour: float | None,
) -> Costs:  # fmt: skip
    """Add up the costs of a run."""
    seconds = {
        "training": counts.sequences * speed.sequence,
        "evaluation": counts.evaluations * counts.evaluated * speed.evaluated,
        "samples": counts.samples * loop.sample_tokens * speed.sampled,
        "saving": counts.held_saves * checkpoint_bytes / SAVED_PER_SECOND,
        "start": speed.start,
    }
    kept = counts.saves if checkpoint.keep_last == 0 else min(checkpoint.kept() + 1, counts.saves)
    if checkpoint.keep_last and checkpoint.keep_every:
        kept += counts.steps // checkpoint.keep_every
    disk = min(kept, counts.saves) * checkpoint_bytes
    return Costs(seconds, checkpoint_bytes, disk, watts, price_per_hour)
