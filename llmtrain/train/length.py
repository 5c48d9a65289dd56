"""The length of training: its steps, sequences and tokens, counted by one function for every part that needs them.

The loop, a resume, the plan, the linter and the header all ask :func:`measure`.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from llmtrain.accumulation import Accumulation
from llmtrain.data.sequences import Sequences
from llmtrain.train.config import LoopConfig


@dataclass(frozen=True)
class Place:
    """A point of training: what has been done before it."""

    step: int = 0  # optimizer steps
    position: int = 0  # sequences, in the data order
    tokens: int = 0  # trained on, without padding


@dataclass(frozen=True)
class Stretch:
    """Consecutive optimizer steps with one batch size."""

    begin: Place
    steps: int
    batch_size: int  # sequences


@dataclass(frozen=True)
class BatchSizes:
    """The batch sizes of a run, which may depend on the tokens trained on, and so on the lengths of the sequences."""

    accumulation: Accumulation
    sequences: Sequences
    seed: int
    shuffle: bool

    def stretches(
        self, begin: Place, *, max_steps: int | None = None, max_position: int | None = None,
        max_tokens: int | None = None,
    ) -> Iterator[Stretch]:  # fmt: skip
        """The steps from ``begin`` up to the first of these limits; the last step may go beyond the other two."""
        place = begin
        while True:
            size = self.accumulation.batch_size_at(place.step, place.tokens)
            change = self.accumulation.next_change(place.step, place.tokens)
            counts = [limit - place.step for limit in (max_steps, change.step) if limit is not None]
            positions = [] if max_position is None else [max_position]
            positions += [self._position_at(place, goal) for goal in (max_tokens, change.tokens) if goal is not None]
            counts += [-(-(position - place.position) // size) for position in positions]
            ends = [max_steps is not None and place.step >= max_steps]
            ends += [max_position is not None and place.position >= max_position]
            ends += [max_tokens is not None and place.tokens >= max_tokens]
            if any(ends):
                return
            assert counts, "a run without an end"
            yield Stretch(place, steps := max(min(counts), 1), size)
            place = self.after(place, steps, steps * size)

    def last_stretch(self, begin: Place, **limits: int | None) -> Stretch:
        """The last of :meth:`stretches`; one without steps where the limits are reached at ``begin``."""
        found = deque(self.stretches(begin, **limits), maxlen=1)
        return found[0] if found else Stretch(begin, 0, 0)

    def after(self, place: Place, steps: int, sequences: int) -> Place:
        """The place after ``steps`` more steps with so many ``sequences`` in all."""
        position = place.position + sequences
        tokens = self._tokens_before(position) - self._tokens_before(place.position)
        return Place(place.step + steps, position, place.tokens + tokens)

    def _tokens_before(self, position: int) -> int:
        return self.sequences.tokens_before(position, self.seed, self.shuffle)

    def _position_at(self, place: Place, tokens: int) -> int:
        """The first position at which the run, from ``place`` on, has trained on ``tokens``."""
        missing = max(tokens - place.tokens, 0)
        return self.sequences.position_of(self._tokens_before(place.position) + missing, self.seed, self.shuffle)


@dataclass(frozen=True)
class TrainingLength:
    """The length of a run from its first step on, from :func:`measure`."""

    sizes: BatchSizes
    max_steps: int  # optimizer steps
    missing: int = 0  # sequences by which the last step is smaller than the others, to end with a whole pass

    def batch_size_at(self, step: int, tokens: int) -> int:
        """Sequences of optimizer step ``step`` (0-based) of a run that has trained on ``tokens`` so far; pure."""
        size = self.sizes.accumulation.batch_size_at(step, tokens)
        return max(size - self.missing_at(step), 1)

    def missing_at(self, step: int) -> int:
        """Sequences by which ``step`` is smaller than the batch size."""
        return self.missing if step == self.max_steps - 1 else 0

    @cached_property
    def end(self) -> Place:
        """The place after the last step."""
        return self.place_from(Place())

    def place_from(self, place: Place) -> Place:
        """The end of the run, continued from ``place``."""
        last = self.sizes.last_stretch(place, max_steps=self.max_steps)
        sequences = last.steps * last.batch_size
        return self.sizes.after(last.begin, last.steps, max(sequences - self.missing, 0))

    def place_after(self, step: int) -> Place:
        """The place after ``step`` steps of the run, if all are whole and it leaves out no data."""
        return replace(self, max_steps=step, missing=0).end

    @property
    def sequences(self) -> int:
        """Sequences of all steps, over all epochs."""
        return self.end.position

    @property
    def tokens(self) -> int:
        """Tokens of all steps, without padding."""
        return self.end.tokens

    @property
    def epochs(self) -> float:
        """Passes over the training data."""
        return self.sequences / len(self.sizes.sequences)

    @cached_property
    def largest_batch(self) -> int:
        """Sequences of the largest step."""
        found = max(stretch.batch_size for stretch in self.sizes.stretches(Place(), max_steps=self.max_steps))
        return found - self.missing if self.max_steps == 1 else found

    def at_least(self, steps: int) -> "TrainingLength":
        """The same run with ``steps`` steps or more."""
        return self if steps <= self.max_steps else TrainingLength(self.sizes, steps)


def measure(
    loop: LoopConfig, accumulation: Accumulation, sequences: Sequences, seed: int, *, shuffle: bool, short: int = 0
) -> TrainingLength:
    """Count the steps of a run over ``sequences``, in the order of ``seed``.

    It ends with ``loop.max_steps`` or with the step that reaches ``loop.epochs``, whichever is first, or with the one
    that reaches ``loop.max_tokens``.  The last step is smaller where the passes end within it, unless
    ``loop.whole_batches``.  ``short``: sequences by which earlier
    last steps of the run were smaller (``TrainState.short_sequences``), if it had ended before and goes on.
    """
    sizes = BatchSizes(accumulation, sequences, seed, shuffle)
    max_position = None if loop.epochs is None else loop.end_position(len(sequences)) + short
    last = sizes.last_stretch(Place(), max_steps=loop.max_steps, max_position=max_position,
                              max_tokens=loop.max_tokens)  # fmt: skip
    steps = last.begin.step + last.steps
    beyond = 0 if max_position is None else last.begin.position + last.steps * last.batch_size - max_position
    return TrainingLength(sizes, steps, 0 if loop.whole_batches else max(beyond, 0))
